"""Errors of the command line itself, and how every error is said to the person at the shell."""

from __future__ import annotations

import sys
import traceback

from sam_export.errors import SamExportError


class CommandError(SamExportError):
    """The command was given something that it cannot work with."""


class Interrupted(Exception):
    """The run was stopped by a signal, after saying what is left.

    Attributes:
        signal: Number of the signal; the exit code is 128 plus this.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def report_error(error: Exception, show_traceback: bool) -> None:
    """Prints ``error: ...`` to the standard error, and the traceback where it is asked for."""
    if show_traceback:
        traceback.print_exception(error)
    print(f"error: {describe(error)}", file=sys.stderr)


def describe(error: Exception) -> str:
    """The message of an error, for a person.

    What is not one of our errors is a bug, or comes from the user's code or the operating system:
    then its type is named as well.
    """
    if isinstance(error, SamExportError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return (
        f"unexpected {type(error).__name__}: {error}\n"
        "This should not happen; run the command again with --traceback to see where."
    )


def source_of(error: BaseException, file: str) -> str | None:
    """``file:line`` of the innermost frame of a traceback that lies in ``file``."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"{file}:{lines[-1]}" if lines else None
