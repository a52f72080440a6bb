"""Compares the speed and memory of SAM steps: eager, compiled, and sam_export's sessions.

One process per contestant; all of a case's processes are started first, each alone, and then take
turns round by round, so that a change in the machine's load meets all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from scripts.bench_cases import CASES, DEFAULT_CASES, Case
from scripts.bench_contestants import (
    CONTESTANTS,
    DEFAULT_CONTESTANTS,
    RECORDED,
    REFERENCE,
    Contestant,
)
from scripts.bench_records import Record, Round, loss_disagreements, steps_per_round, wants_more
from scripts.bench_table import markdown_page, markdown_table

ROOT = Path(__file__).resolve().parents[1]
ROUND_SECONDS = 0.5
WARM_UP_SECONDS = 1.0
MAX_ROUNDS_FACTOR = 4
"""A busy machine may need this many times the rounds that are to count; then it is given up."""


class ChildFailed(RuntimeError):
    """A contestant's process ended before it was told to."""


class Child:
    """The process of one contestant; a context manager that ends it."""

    def __init__(
        self,
        contestant: Contestant,
        case: Case,
        folder: Path,
        artifact: Path | None,
        threads: int,
        device: str,
    ) -> None:
        command = [sys.executable, "-m", "scripts.bench_child"]
        command += ["--contestant", contestant.name, "--case", case.name]
        command += ["--batches", str(folder / "batches.npz"), "--threads", str(threads)]
        command += ["--device", device]
        if artifact is not None:
            command += ["--artifact", str(artifact)]
        self._log = (folder / f"{contestant.name}.log").open("w+")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(folder, contestant.name, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            # A command that the child did not live to read is still in the pipe's buffer.
            with suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def listen(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            ChildFailed: The process ended instead; with the last line of its error output.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            errors = [text for text in self._log.read().splitlines() if text.strip()]
            raise ChildFailed(errors[-1] if errors else f"exit code {self._process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended: `listen` says why
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return self.listen()


def _environment(folder: Path, contestant: str, threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **os.environ,
        **dict.fromkeys(names, str(threads)),
        # Compiles in the process itself, from nothing: no idle helpers, honest build times.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{contestant}"),
    }


def write_batches(case: Case, folder: Path) -> None:
    """Writes the batches that all contestants of a case are fed."""
    _, batches = case.recipe()
    arrays = {}
    for index, (x, y) in enumerate(batches):
        arrays[f"x{index}"], arrays[f"y{index}"] = x.numpy(), y.numpy()
    np.savez(folder / "batches.npz", **arrays)


def export_artifact(
    case: Case, target: str, folder: Path, device: str, every: int = 1, staged: bool = False
) -> tuple[Path, float]:
    """Exports the case's step; returns the artifact's folder and the seconds it took."""
    import sam_export as sx
    from sam_export.api import device_to_build_for

    step, batches = case.recipe()
    step.model.to(device)
    step.optimizer.every = every
    start = time.perf_counter()
    captured = sx.capture(step, tuple(value.to(device) for value in batches[0]), staged=staged)
    path = folder / f"artifact-{target}-every-{every}{'-staged' * staged}"
    sx.export(captured, path, target=target, device=device_to_build_for(target, device))
    return path, time.perf_counter() - start


@dataclass(frozen=True)
class Running:
    """A contestant that is built, with the record it fills.

    Attributes:
        record: Where its numbers go.
        child: Its process.
        steps: Steps of one round.
    """

    record: Record
    child: Child
    steps: int

    def run_round(self) -> None:
        """Times one round, unless the contestant has failed in an earlier one."""
        if self.record.error is not None:
            return
        try:
            timed = self.child.ask("round", steps=self.steps)
        except ChildFailed as error:
            self.record.error = f"ChildFailed: {error}"
            return
        self.record.rounds.append(
            Round(self.steps, timed["wall_s"], timed["cpu_s"], timed["device_s"])
        )

    def read_peak(self) -> None:
        """Asks for the peak memory of the rounds."""
        if self.record.error is None:
            try:
                self.record.peak = self.child.ask("memory")["peak"]
            except ChildFailed as error:
                self.record.error = f"ChildFailed: {error}"

    def read_waits(self, steps: int) -> None:
        """Asks a contestant with torch for the calls in a step that wait for the device."""
        if self.record.error is None and CONTESTANTS[self.record.contestant].tensors:
            try:
                self.record.waits = self.child.ask("profile", steps=steps)["waits"]
            except ChildFailed as error:
                self.record.error = f"ChildFailed under the profiler: {error}"


def build(
    stack: ExitStack,
    contestant: Contestant,
    case: Case,
    folder: Path,
    record: Record,
    device: str = "cpu",
) -> Running | None:
    """Starts one contestant and waits until it is built and warm; None where that fails."""
    artifact = None
    try:
        if contestant.target is not None:
            artifact, record.export_s = export_artifact(
                case, contestant.target, folder, device, contestant.every, contestant.staged
            )
        start = time.perf_counter()
        child = stack.enter_context(
            Child(contestant, case, folder, artifact, record.threads, device)
        )
        built = child.listen()
        record.start_s = time.perf_counter() - start
        record.build_s, record.losses = built["build_s"], built["losses"]
        record.memory_before = built["memory_before"]
        record.memory_built = built["memory_built"]
        warm = child.ask("warm_up", seconds=WARM_UP_SECONDS)
    except Exception as error:  # a contestant that fails is a row of the table, not the end
        record.error = f"{type(error).__name__}: {error}"
        return None
    return Running(record, child, steps_per_round(warm["step_s"], ROUND_SECONDS))


def run_case(
    case: Case,
    contestants: list[Contestant],
    rounds: int,
    threads: int,
    device: str = "cpu",
    profiled_steps: int = 0,
) -> list[Record]:
    """Measures all contestants on one case.

    Args:
        case: The model and its batches.
        contestants: Who runs.
        rounds: Rounds that are to count.
        threads: Of each contestant.
        device: Where they run; on CUDA, time and memory are the device's.
        profiled_steps: Steps to look at with torch's profiler after the rounds, see `gpu_waits`.
    """
    with tempfile.TemporaryDirectory(prefix="sam-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        write_batches(case, folder)
        records = [Record(contestant.name, threads) for contestant in contestants]
        running: list[Running] = []
        for contestant, record in zip(contestants, records, strict=True):
            entry = build(stack, contestant, case, folder, record, device)
            _say(f"{case.name}: {contestant.name}: {record.error or 'built'}")
            if entry is not None:
                running.append(entry)
        index = 0
        while running and wants_more(records, rounds, MAX_ROUNDS_FACTOR * rounds):
            # A different contestant goes first each time.
            shift = index % len(running)
            for entry in running[shift:] + running[:shift]:
                entry.run_round()
            index += 1
            fewest = min(len(entry.record.counted) for entry in running)
            _say(f"{case.name}: round {index}, {fewest} of {rounds} count")
        for entry in running:
            entry.read_peak()
            if profiled_steps:
                entry.read_waits(profiled_steps)
    return records


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check_same_work(records: list[Record]) -> list[str]:
    """Complaints about contestants that failed or do not compute the same losses."""
    complaints = [f"{item.contestant}: {item.error}" for item in records if item.error]
    reference = next((r for r in records if r.contestant == REFERENCE and not r.error), None)
    if reference is not None:
        sam = {name for name, item in CONTESTANTS.items() if item.is_sam}
        complaints += loss_disagreements(records, reference, sam)
    return complaints


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 when a contestant failed or computed other losses."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of each contestant")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are to count")
    here = [name for name in CONTESTANTS if name not in RECORDED]  # which are for CUDA
    comparable = [name for name, case in CASES.items() if not case.draws]
    parser.add_argument(
        "--models", nargs="+", choices=comparable, default=list(DEFAULT_CASES), metavar="MODEL",
        help=f"of {', '.join(comparable)} (default: {', '.join(DEFAULT_CASES)})",
    )  # fmt: skip
    parser.add_argument(
        "--contestants", nargs="+", choices=here, default=list(DEFAULT_CONTESTANTS), metavar="NAME",
        help=f"of {', '.join(here)} (default: {', '.join(DEFAULT_CONTESTANTS)})",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="Markdown file to write (docs/benchmarks/...)")
    options = parser.parse_args(argv)
    if options.threads < 1 or options.rounds < 1:
        parser.error("--threads and --rounds must be 1 or more")

    contestants = [CONTESTANTS[name] for name in options.contestants]
    sections, complaints = [], []
    for name in options.models:
        case = CASES[name]
        records = run_case(case, contestants, options.rounds, options.threads)
        sections.append((case.name, case.description, records))
        complaints += [f"{name}: {text}" for text in check_same_work(records)]
        print(f"\n## {case.description}\n\n{markdown_table(records, REFERENCE)}\n", flush=True)
    legend = [f"`{item.name}`: {item.description}" for item in contestants]
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(markdown_page(sections, REFERENCE, options.threads, legend))
        print(f"Written to {options.out}")
    for text in complaints:
        _say(f"error: {text}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
