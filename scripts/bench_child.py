"""One contestant of the benchmark in its own process: builds its step, then obeys commands.

Each line of the standard input is a JSON command, each line of the output the JSON answer::

    {"do": "warm_up", "seconds": 1.0}  ->  {"step_s": 0.0021}
    {"do": "round", "steps": 250}      ->  {"wall_s": 0.52, "cpu_s": 0.51, "loss": 0.03}
    {"do": "memory"}                   ->  {"peak": 412123136}
    {"do": "stop"}

Once it is built it says its ``build_s``, ``memory_before``, ``memory_built`` and first ``losses``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from scripts.bench_cases import CASES
from scripts.bench_contestants import CONTESTANTS, Contestant, StepFunction

FIRST_STEPS = 2
"""Steps that belong to building: compilers work at the first call, slots are made by it."""

MIN_WARM_UP_STEPS = 5


def read_status(field: str) -> int:
    """Bytes of one memory field (``VmRSS``, ``VmHWM``) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"No {field} in /proc/self/status: memory is measured on Linux only.")


def forget_peak() -> None:
    """Lets ``VmHWM`` start again from what is resident now, without garbage of the build."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def load_batches(path: Path, contestant: Contestant) -> list[tuple[Any, Any]]:
    """The batches of the case in the form that the contestant is fed."""
    with np.load(path) as arrays:
        count = len(arrays.files) // 2
        batches = [(arrays[f"x{index}"], arrays[f"y{index}"]) for index in range(count)]
    if not contestant.tensors:
        return batches
    import torch

    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches]


def run_steps(step: StepFunction, batches: Iterator[tuple[Any, Any]], steps: int) -> dict[str, Any]:
    """Times ``steps`` steps by the wall clock and by this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss: Any = None
    for _ in range(steps):
        loss = step(*next(batches))
    value = float(loss)  # waits for the last step
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "loss": value,
    }


def warm_up(
    step: StepFunction, batches: Iterator[tuple[Any, Any]], seconds: float
) -> dict[str, Any]:
    """Runs for ``seconds`` at least and says how long a step took in the end."""
    start, steps = time.perf_counter(), 0
    while steps < MIN_WARM_UP_STEPS or time.perf_counter() - start < seconds:
        last = run_steps(step, batches, 1)["wall_s"]
        steps += 1
    return {"step_s": last}


def serve(answers: TextIO, options: argparse.Namespace) -> None:
    """Builds the contestant, then answers commands until ``stop`` or the end of the input."""
    contestant = CONTESTANTS[options.contestant]
    contestant.prepare(options.threads)
    loaded = load_batches(options.batches, contestant)
    batches = itertools.cycle(loaded)
    memory_before = read_status("VmRSS")

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    start = time.perf_counter()
    step = contestant.build(CASES[options.case], options.artifact, options.threads)
    losses = [float(step(*next(batches))) for _ in range(FIRST_STEPS)]
    build_s = time.perf_counter() - start
    forget_peak()
    memory = {"memory_before": memory_before, "memory_built": read_status("VmRSS")}
    answer({"build_s": build_s, "losses": losses, **memory})

    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "warm_up":
                answer(warm_up(step, batches, command["seconds"]))
            case "round":
                answer(run_steps(step, batches, command["steps"]))
            case "memory":
                answer({"peak": read_status("VmHWM")})
            case "stop":
                return
            case other:
                raise ValueError(f"Unknown command {other!r}.")


def main() -> None:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestant", required=True, choices=sorted(CONTESTANTS))
    parser.add_argument("--case", required=True, choices=sorted(CASES))
    parser.add_argument("--batches", required=True, type=Path)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--threads", required=True, type=int)
    options = parser.parse_args()
    # Libraries print to file descriptor 1 as they like; the answers need a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(answers, options)


if __name__ == "__main__":
    main()
