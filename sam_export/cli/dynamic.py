"""``--dynamic``: which sizes of the batch stay symbolic."""

from __future__ import annotations

import argparse

from sam_export.cli.errors import CommandError

HELP = (
    "which sizes may change from step to step: batch (dimension 0 of each input, default), none, "
    "or input.dimension=name,...: x.0=batch,x.1=time,target.0=batch"
)


def add_dynamic(parser: argparse.ArgumentParser) -> None:
    """Adds the option to a parser."""
    parser.add_argument("--dynamic", metavar="SIZES", default="batch", help=HELP)


def parse_dynamic(text: str) -> str | dict[str, dict[int, str]] | None:
    """What `capture` takes, from the option's text.

    Raises:
        CommandError: Another form, or a dimension that is given twice.
    """
    if text in ("batch", "none"):
        return None if text == "none" else text
    marks: dict[str, dict[int, str]] = {}
    for mark in text.split(","):
        place, equals, name = mark.strip().partition("=")
        value, dot, dimension = place.rpartition(".")
        if not (equals and dot and value and dimension.isdecimal() and name.isidentifier()):
            raise CommandError(
                f"--dynamic {text!r}: {mark.strip()!r} is not of the form input.dimension=name, as "
                "in x.1=time."
            )
        if int(dimension) in marks.setdefault(value, {}):
            raise CommandError(f"--dynamic {text!r}: {place} is given twice.")
        marks[value][int(dimension)] = name
    return marks
