"""What random numbers cost: a step with dropout against the same step without, per target.

Both train in a process of their own and take turns, as in `scripts/bench`. Dropout's own products
count as part of the cost, so the share of the draws is at most what the table says.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from scripts.bench import MAX_ROUNDS_FACTOR, build, write_batches
from scripts.bench_cases import CASES
from scripts.bench_contestants import CONTESTANTS, Contestant
from scripts.bench_records import Record, wants_more

PAIRS = {"wide_resnet_dropout": "wide_resnet", "vit_dropout": "vit", "gpt_dropout": "gpt"}
"""A case with dropout, and the same without."""

DEFAULT = ("eager-sam", "torch-compile", "torchscript", "aot-inductor", "onnx")


def measure(contestant: Contestant, case: str, rounds: int, threads: int) -> tuple[Record, Record]:
    """Rounds of one contestant on a case with dropout and on the same case without."""
    records = (Record(contestant.name, threads), Record(contestant.name, threads))
    with ExitStack() as stack:
        running = []
        for name, record in zip((case, PAIRS[case]), records, strict=True):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sam-bench-")))
            write_batches(CASES[name], folder)
            entry = build(stack, contestant, CASES[name], folder, record)
            if entry is None:
                raise SystemExit(f"error: {contestant.name} on {name}: {record.error}")
            running.append(entry)
        index = 0
        while wants_more(list(records), rounds, MAX_ROUNDS_FACTOR * rounds):
            for entry in running if index % 2 else reversed(running):
                entry.run_round()
            index += 1
    return records


def main(argv: list[str] | None = None) -> int:
    """Prints one table per case."""
    parser = argparse.ArgumentParser(
        prog="scripts.bench_draws", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each contestant")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are to count")
    parser.add_argument("--cases", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--contestants", nargs="+", choices=list(DEFAULT), default=list(DEFAULT))
    options = parser.parse_args(argv)
    for case in options.cases:
        print(f"\n## {CASES[case].description}, against the same without\n")
        print("| | time | rounds |\n|---|---:|---:|", flush=True)
        for name in options.contestants:
            drawn, plain = measure(CONTESTANTS[name], case, options.rounds, options.threads)
            ratio = _median(drawn) / _median(plain)
            counted = f"{len(drawn.counted)} and {len(plain.counted)}"
            print(f"| {name} | {ratio:.3f} | {counted} |", flush=True)
    return 0


def _median(record: Record) -> float:
    return statistics.median(item.wall_s / item.steps for item in record.counted)


if __name__ == "__main__":
    sys.exit(main())
