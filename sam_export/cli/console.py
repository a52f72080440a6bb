"""Tables and progress bars: by rich where it is installed and a person watches, else plain text."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TextIO

BAR_WIDTH = 24
_SHORTEST_PAUSE = 0.1  # seconds between two drawings of the plain bar


class Progress(Protocol):
    """A bar that shows how far a long piece of work is."""

    def advance(self, text: str = "") -> None:
        """One unit is done; ``text`` says what is new (the loss, for example)."""

    def message(self, line: str) -> None:
        """Prints a line above the bar."""


class SilentProgress:
    """No bar: the standard error is a file or a pipe. Messages are printed."""

    def advance(self, text: str = "") -> None:
        """Nothing to draw."""

    def message(self, line: str) -> None:
        """Prints the line at once, so that a log file shows where a run is."""
        print(line, flush=True)


class PlainProgress:
    """A bar of hash signs on one line that is drawn again and again."""

    def __init__(self, total: int | None, label: str, stream: TextIO) -> None:
        self._total, self._label, self._stream = total, label, stream
        self._done, self._drawn_at, self._length = 0, 0.0, 0
        self._text = ""
        self._draw()

    def advance(self, text: str = "") -> None:
        """One unit is done."""
        self._done += 1
        self._text = text
        if self._done == self._total or time.monotonic() - self._drawn_at > _SHORTEST_PAUSE:
            self._draw()

    def message(self, line: str) -> None:
        """Prints a line above the bar."""
        self.clear()
        print(line, flush=True)
        self._draw()

    def clear(self) -> None:
        """Removes the bar from the screen."""
        self._stream.write("\r" + " " * self._length + "\r")
        self._stream.flush()

    def _draw(self) -> None:
        count = str(self._done)
        bar = ""
        if self._total:
            filled = BAR_WIDTH * self._done // self._total
            bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] "
            count += f"/{self._total}"
        line = f"{self._label} {bar}{count} {self._text}".rstrip()
        self._stream.write("\r" + line.ljust(self._length))
        self._stream.flush()
        self._length = len(line)
        self._drawn_at = time.monotonic()


class _RichProgress:
    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, text: str = "") -> None:
        self._bar.update(self._task, advance=1, text=text)

    def message(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)


def has_rich() -> bool:
    """Whether rich (the extra ``cli``) is installed."""
    return importlib.util.find_spec("rich") is not None


@contextmanager
def progress(total: int | None, label: str) -> Iterator[Progress]:
    """A bar on the standard error for as long as the block runs; none where no person sees it.

    Args:
        total: Number of units; None when it is not known.
        label: What is being done.
    """
    if not sys.stderr.isatty():
        yield SilentProgress()
        return
    if not has_rich():
        plain = PlainProgress(total, label, sys.stderr)
        try:
            yield plain
        finally:
            plain.clear()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _RichProgress(bar, bar.add_task(label, total=total, text=""))


class PhaseBars:
    """One bar after the other, for work that reports a phase and how far it is."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._shown = 0
        self._stack = ExitStack()

    def __enter__(self) -> PhaseBars:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def show(self, phase: str, done: int, total: int) -> None:
        """Draws the bar of ``phase`` at ``done`` of ``total`` steps."""
        if phase != self._phase or done < self._shown:
            self._stack.close()
            self._bar = self._stack.enter_context(progress(total or None, phase))
            self._phase, self._shown = phase, 0
        for _ in range(done - self._shown):
            self._bar.advance()
        self._shown = done


@contextmanager
def stage(label: str, spin: bool = True) -> Iterator[None]:
    """Says on the standard error that a piece of work of unknown length runs, and how long it took.

    Args:
        label: What is being done.
        spin: Whether to draw something meanwhile; no where the block draws a bar itself.
    """
    start = time.monotonic()
    if not spin or not sys.stderr.isatty():
        yield
    elif has_rich():
        from rich.console import Console

        with Console(stderr=True).status(f"{label} ..."):
            yield
    else:
        print(f"{label} ...", end="", file=sys.stderr, flush=True)
        try:
            yield
        except BaseException:
            print(file=sys.stderr)
            raise
        print("\r", end="", file=sys.stderr)
    print(f"{label}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints a table to the standard output.

    Args:
        headers: One word for each column.
        rows: The cells, as text; one per header.
        title: Printed above it.
    """
    if sys.stdout.isatty() and has_rich():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, title_justify="left", header_style="bold")
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    if title:
        print(title)
    print(plain_table(headers, rows))


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as lines of text, columns aligned by spaces; numbers to the right."""
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [bool(rows) and all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return "  " + "  ".join(padded).rstrip()

    rule = ["-" * width for width in widths]
    return "\n".join([line(headers), line(rule), *(line(row) for row in rows)])


def format_bytes(count: int) -> str:
    """A size for people: ``1.5 MB``."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _is_number(cell: str) -> bool:
    return cell.split(" ")[0].replace(",", "").replace(".", "").isdigit()
