"""A parity report in the Markdown of pull requests: the verdict first, details folded away."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping, Sequence
from html import escape
from typing import Any

from sam_export.parity.report import ParityReport
from sam_export.parity.text_file import write_text
from sam_export.report.parity_laws import broken_laws, reference_sentence
from sam_export.report.parity_words import (
    ONLY_FREE,
    Values,
    as_values,
    badness,
    counts,
    difference_facts,
    facts_sentence,
    flattened,
    growth_words,
    largest,
    number,
    verdict_sentence,
    where,
)

_ROWS = 10
"""Rows that differ that are listed of one target; how many are left out is said."""


def write_markdown(report: ParityReport | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `to_markdown` to a file, whole or not at all.

    Raises:
        ParityError: The file cannot be written, or the values are of another format.
    """
    write_text(path, to_markdown(report))


def to_markdown(report: ParityReport | Mapping[str, Any]) -> str:
    """The verdict, a table of the targets, what differs, and how to repeat it.

    Args:
        report: The report, or the values of its JSON form.

    Raises:
        ParityError: The values are of another format than this version's.
    """
    values = as_values(report)
    lines = [
        f"### Parity with eager PyTorch: {'✅ equal' if values['ok'] else '❌ not equal'}",
        "",
        _text(verdict_sentence(values)),
        "",
        *_table(
            ("target", "verdict", "ran on", "lock-step", "free-running", "drift", "ok/noise/FAIL"),
            [_target_cells(target) for target in values["targets"]],
            numeric=range(3, 7),
        ),
        "",
        f"Largest error relative to the change. {_text(facts_sentence(values))}.",
        *(f"\n**{_text(text)}**" for text in broken_laws(values)),
        *(f"\n{_text(text)}" for text in filter(None, [reference_sentence(values)])),
        *(f"\n> {_text(note)}" for note in values["notes"]),
    ]
    for target in values["targets"]:
        if not target["ok"]:
            lines += ["", *_failure(target)]
    again = [_fenced(values["command"]), "", *_ledger(values)]
    lines += ["", *_folded("Run it again, and what the numbers depend on", again)]
    return "\n".join(lines) + "\n"


def _target_cells(target: Values) -> tuple[str, ...]:
    counted = counts(target["rows"])
    return (
        f"**{_text(target['name'])}**",
        "✅ equal" if target["ok"] else "❌ not equal",
        _text(target["provider"] or "not known"),
        largest(target["lock_step"]),
        largest(target["free_running"]),
        growth_words(target["growth"]),
        f"{counted['ok']}/{counted['noise']}/{counted['FAIL']}",
    )


def _failure(target: Values) -> list[str]:
    lines = [f"#### {_text(target['name'])}"]
    if target["error"] is not None:
        lines += ["", _fenced(target["error"])]
    if target["differences"]:
        first = target["differences"][0]
        lines += [
            "",
            f"Differs first {_text(where(first))}: {_code(first['name'])}",
            "",
            *(f"- {label}: {_text(text)}" for label, text in difference_facts(first)),
        ]
        if first["mode"] == "free-running":
            lines += ["", ONLY_FREE]
    failed = sorted(
        (row for row in target["rows"] if row["verdict"] == "FAIL"), key=badness, reverse=True
    )
    if failed:
        rows = [
            (
                # In a cell, and only there, a bar inside code has to be escaped too.
                _code(row["name"]).replace("|", "\\|"),
                _text(row["mode"]),
                str(row["step"]),
                *(number(row[key]) for key in ("change", "error", "relative", "bound")),
                _text(row["note"]),
            )
            for row in failed[:_ROWS]
        ]
        head = ("tensor", "mode", "step", "change", "error", "relative", "bound", "note")
        more = len(failed) - len(rows)
        said = f"{len(failed)} comparisons that differ"
        said += f" ({len(rows)} worst shown, {more} more)" if more else ""
        lines += ["", *_folded(said, _table(head, rows, numeric=range(2, 7)))]
    return lines


def _ledger(values: Values) -> list[str]:
    rows = [
        (_text(section), _text(key), _text(text))
        for section, block in values["ledger"].items()
        for key, text in flattened(block)
    ]
    return _table(("", "", "value"), rows, numeric=())


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Container[int]
) -> list[str]:
    rule = ["---:" if index in numeric else "---" for index in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _folded(summary: str, lines: Sequence[str]) -> list[str]:
    # The blank line is what makes Markdown inside HTML be read as Markdown.
    return ["<details>", f"<summary>{escape(summary)}</summary>", "", *lines, "", "</details>"]


def _text(text: str) -> str:
    """Text in which nothing is markup, on one line, fit for a cell of a table."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~&@])", r"\\\1", " ".join(text.split()))
    # A backslash before < is enough for Markdown, not for what reads the file as HTML first.
    return escaped.replace("\\&", "&amp;").replace("\\<", "&lt;").replace("\\>", "&gt;")


def _code(text: str) -> str:
    """A name as code; longer fences than any run of backticks in it, as Markdown has it."""
    flat = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", flat)), default=0))
    space = " " if "`" in flat else ""
    return f"{fence}{space}{flat}{space}{fence}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
