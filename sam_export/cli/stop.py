"""Ctrl-C and SIGTERM during a training run: finish the step, then stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Stop:
    """Says whether somebody asked the run to stop.

    Attributes:
        signal: Number of the signal that asked; None while nobody has.
    """

    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second one stops at once."""
    stop = Stop()

    def handle(number: int, frame: Any) -> None:
        del frame
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main one
        yield stop
        return
    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
