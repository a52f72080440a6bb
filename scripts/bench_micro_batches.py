"""What a batch in parts costs and saves: one step with k micro-batches against the unsplit one.

Each number of parts trains in a process of its own, all in turns, as in `scripts/bench`. The batch
is repeated to many examples, so that activations, not weights, are what takes memory.

Times are CPU seconds of the process, at one thread: on a busy machine hardly any round has the
processor to itself, and they do not count the time that others have it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.bench import build, write_batches
from scripts.bench_cases import CASES, Case
from scripts.bench_contestants import CONTESTANTS, Contestant
from scripts.bench_records import Record

SIZES = {"mlp": 8192, "digits_cnn": 1024, "wide_resnet": 64}
"""Model to the examples of its batch."""

DEFAULT = ("torch-compile", "onnx")


def divided(case: Case, size: int, parts: int, per: str) -> Case:
    """The case with its first batch, repeated to ``size`` examples, and a step in parts."""

    def recipe() -> Any:
        import sam_export as sx

        step, batches = case.recipe()
        x, y = batches[0]
        times = size // len(x)
        semantics = replace(step.semantics, micro_batches=parts, perturbation_per=per)
        made = sx.TrainStep(
            step.model, step.loss_fn, step.optimizer, step.num_targets, semantics, step.seed
        )
        return made, [(x.repeat(times, *[1] * (x.dim() - 1)), y.repeat(times))]

    return replace(case, recipe=recipe)


def measure(contestant: Contestant, cases: list[Case], rounds: int) -> list[Record]:
    """Rounds of one contestant on each of the cases, in turns."""
    records = [Record(contestant.name, threads=1) for _ in cases]
    with ExitStack() as stack:
        running = []
        for case, record in zip(cases, records, strict=True):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sam-bench-")))
            write_batches(case, folder)
            entry = build(stack, contestant, case, folder, record)
            if entry is None:
                raise SystemExit(f"error: {contestant.name} on {case.name}: {record.error}")
            running.append(entry)
        for index in range(rounds):
            shift = index % len(running)
            for entry in running[shift:] + running[:shift]:
                entry.run_round()
        for entry in running:
            entry.read_peak()
    return records


def main(argv: list[str] | None = None) -> int:
    """Prints one table per model."""
    parser = argparse.ArgumentParser(
        prog="scripts.bench_micro_batches", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=["mlp", "digits_cnn"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=DEFAULT)
    parser.add_argument("--parts", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--per", choices=["batch", "micro_batch"], default="batch")
    options = parser.parse_args(argv)
    for model in options.models:
        size = SIZES[model]
        print(f"\n## {CASES[model].description.rpartition(',')[0]}, batch {size}\n")
        print("| | parts | step | time | peak - imports | of unsplit | rounds | build |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        for name in options.contestants:
            cases = [divided(CASES[model], size, k, options.per) for k in options.parts]
            records = measure(CONTESTANTS[name], cases, options.rounds)
            first = records[0]
            for parts, record in zip(options.parts, records, strict=True):
                held = record.working_memory
                print(
                    f"| {name} | {parts} | {1e3 * _median(record):.0f} ms "
                    f"| {_median(record) / _median(first):.2f} | {held / 2**20:.1f} MiB "
                    f"| {held / first.working_memory:.2f} "
                    f"| {len(record.rounds)} | {record.start_s:.0f} s |",
                    flush=True,
                )
    return 0


def _median(record: Record) -> float:
    return statistics.median(item.cpu_s / item.steps for item in record.rounds)


if __name__ == "__main__":
    sys.exit(main())
