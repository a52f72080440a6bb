"""What ``sam-export parity`` compares: targets, artifacts that exist, a loop of the user's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sam_export.cli.errors import CommandError
from sam_export.cli.function import load_function
from sam_export.runtime.detect import TARGETS, target_status


def add_subjects(parser: argparse.ArgumentParser) -> None:
    """Adds the options to the parser."""
    parser.add_argument(
        "--targets",
        default=None,
        metavar="A,B",
        help=f"which targets, of {', '.join(TARGETS)} (default: all that this machine can run, or "
        "none with --artifact)",
    )
    parser.add_argument(
        "--artifact",
        dest="artifacts",
        metavar="DIR",
        action="append",
        default=[],
        help="an artifact that exists already; may be repeated",
    )
    parser.add_argument(
        "--reference",
        metavar="FUNCTION",
        help="your own eager loop, path/to/file.py:function: function(model, optimizer) returns "
        "step(*batch), which trains the model in place and returns the loss",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="where built artifacts are kept for the next check (default: $SAM_EXPORT_CACHE, or "
        "sam_export in the user's cache folder)",
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="build all artifacts anew, and keep none"
    )


def subjects(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Keywords of `check_parity` from the options.

    Args:
        args: The parsed options.
        dtype: Of the recipe's parameters, as torch names it (``torch.float32``).

    Raises:
        CommandError: A target cannot be compared here, an artifact is given twice, or the loop
            cannot be found.
    """
    from sam_export.parity.artifacts import default_cache

    keywords: dict[str, Any] = {
        "targets": chosen_targets(args, dtype),
        "artifacts": _named(args.artifacts),
        "seed": args.seed,
        "cache": None if args.no_cache else Path(args.cache) if args.cache else default_cache(),
    }
    if args.reference:
        keywords["reference"] = load_function(args.reference)
    return keywords


def chosen_targets(args: argparse.Namespace, dtype: str) -> list[str]:
    """``--targets``, or all that this machine can run a model of that dtype on; others are said."""
    if args.targets is not None:
        return checked(parse_targets(args.targets))
    if args.artifacts:
        return []
    chosen = []
    for target in TARGETS:
        reason = lacking(target)
        if target == "ort-artifacts" and dtype != "torch.float32":
            reason = f"it has float32 gradients only, the model is {dtype.removeprefix('torch.')}"
        if reason:
            print(f"left out: {target}: {reason}", file=sys.stderr)
        else:
            chosen.append(target)
    return chosen


def parse_targets(text: str) -> list[str]:
    """The targets of a comma-separated list.

    Raises:
        CommandError: One of them is unknown, or given twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in TARGETS]
    if not names or unknown or len(set(names)) != len(names):
        raise CommandError(
            f"--targets {text!r}: expected names out of {', '.join(TARGETS)}, each once, with "
            "commas between them."
        )
    return names


def checked(targets: list[str]) -> list[str]:
    """The targets, all of which this machine can export to and run.

    Raises:
        CommandError: It cannot; with the command that installs what is missing.
    """
    for target in targets:
        if reason := lacking(target):
            raise CommandError(f"Comparing {target} {reason}")
    return targets


def lacking(target: str) -> str:
    """What a comparison with ``target`` lacks here; empty for nothing."""
    status = target_status(target)
    missing = (*status.export, *status.run)
    if not missing:
        return ""
    advice = "; ".join(dict.fromkeys(item.install for item in missing))
    whats = ", ".join(dict.fromkeys(item.what for item in missing))
    return f"needs {whats}. Install: {advice}."


def _named(folders: list[str]) -> dict[str, Path]:
    """Artifacts by their folders' names; by the whole path where two share one."""
    paths = [Path(folder) for folder in folders]
    if len(set(paths)) != len(paths):
        raise CommandError("--artifact is given twice for the same folder.")
    names = [path.resolve().name for path in paths]
    return {
        str(path) if names.count(name) > 1 else name: path
        for name, path in zip(names, paths, strict=True)
    }
