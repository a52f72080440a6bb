"""One contestant of the benchmark in its own process: builds its step, then obeys commands.

Each line of the standard input is a JSON command, each line of the output the JSON answer::

    {"do": "warm_up", "seconds": 1.0}  ->  {"step_s": 0.0021}
    {"do": "round", "steps": 250}      ->  {"wall_s": 0.52, "cpu_s": 0.51, "loss": 0.03}
    {"do": "memory"}                   ->  {"peak": 412123136}
    {"do": "profile", "steps": 5}      ->  {"waits": {"aten::item": 5}}
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


class Meter:
    """Time and memory of a device: the wall clock and this process's memory, or CUDA's own.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        contestant: One without torch has no CUDA events, and its memory on a GPU is not known.
    """

    def __init__(self, device: str, contestant: Contestant) -> None:
        self.is_cuda = device != "cpu"
        self._cuda: Any = None
        if self.is_cuda and contestant.tensors:
            import torch

            torch.cuda.set_device(torch.device(device).index or 0)
            self._cuda = torch.cuda

    def begin(self) -> Any:
        """Marks the start of a run of steps."""
        if self._cuda is None:
            return time.perf_counter()
        start = self._cuda.Event(enable_timing=True)
        start.record()
        return start

    def seconds(self, start: Any) -> float:
        """Seconds since ``start`` until all steps are done."""
        if self._cuda is None:
            return time.perf_counter() - start
        end = self._cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def resident(self) -> int:
        """Bytes taken now, of the device's memory that torch has reserved or of the process."""
        if self.is_cuda:
            return int(self._cuda.memory_reserved()) if self._cuda else 0
        return read_status("VmRSS")

    def peak(self) -> int:
        """The most that `resident` was since `forget_peak`; 0 where it is not known."""
        if self.is_cuda:
            return int(self._cuda.max_memory_reserved()) if self._cuda else 0
        return read_status("VmHWM")

    def forget_peak(self) -> None:
        """Lets `peak` start again from what is taken now, without garbage of the build."""
        if not self.is_cuda:
            forget_peak()
        elif self._cuda is not None:
            gc.collect()
            self._cuda.empty_cache()
            self._cuda.reset_peak_memory_stats()


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


def load_batches(path: Path, contestant: Contestant, device: str) -> list[tuple[Any, Any]]:
    """The batches of the case as the contestant is fed them; tensors are on its device already."""
    with np.load(path) as arrays:
        count = len(arrays.files) // 2
        batches = [(arrays[f"x{index}"], arrays[f"y{index}"]) for index in range(count)]
    if not contestant.tensors:
        return batches
    import torch

    return [(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) for x, y in batches]


def run_steps(
    step: StepFunction, batches: Iterator[tuple[Any, Any]], steps: int, meter: Meter
) -> dict[str, Any]:
    """Times ``steps`` steps by the device's clock, the wall clock and this process's CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    start = meter.begin()
    loss: Any = None
    for _ in range(steps):
        loss = step(*next(batches))
    value = float(loss)  # waits for the last step
    device_s = meter.seconds(start)
    return {
        "device_s": device_s if meter.is_cuda else None,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "loss": value,
    }


def warm_up(
    step: StepFunction, batches: Iterator[tuple[Any, Any]], seconds: float, meter: Meter
) -> dict[str, Any]:
    """Runs for ``seconds`` at least and says how long a step took in the end."""
    start, steps = time.perf_counter(), 0
    while steps < MIN_WARM_UP_STEPS or time.perf_counter() - start < seconds:
        last = run_steps(step, batches, 1, meter)["wall_s"]
        steps += 1
    return {"step_s": last}


def serve(answers: TextIO, options: argparse.Namespace) -> None:
    """Builds the contestant, then answers commands until ``stop`` or the end of the input."""
    contestant = CONTESTANTS[options.contestant]
    contestant.prepare(options.threads)
    meter = Meter(options.device, contestant)
    loaded = load_batches(options.batches, contestant, options.device)
    batches = itertools.cycle(loaded)
    memory_before = meter.resident()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    start = time.perf_counter()
    case = CASES[options.case]
    step = contestant.build(case, options.artifact, options.threads, options.device)
    losses = [float(step(*next(batches))) for _ in range(FIRST_STEPS)]
    build_s = time.perf_counter() - start
    meter.forget_peak()
    memory = {"memory_before": memory_before, "memory_built": meter.resident()}
    answer({"build_s": build_s, "losses": losses, **memory})

    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "warm_up":
                answer(warm_up(step, batches, command["seconds"], meter))
            case "round":
                answer(run_steps(step, batches, command["steps"], meter))
            case "memory":
                answer({"peak": meter.peak()})
            case "profile":
                from scripts.gpu_waits import waits

                answer({"waits": waits(step, batches, command["steps"], options.device)})
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
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    # Libraries print to file descriptor 1 as they like; the answers need a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(answers, options)


if __name__ == "__main__":
    main()
