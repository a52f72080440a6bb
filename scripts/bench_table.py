"""The benchmark's record as Markdown, with the machine and the versions it was made on."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from scripts.bench_records import MIN_CPU_SHARE, Record, ratio

_MIB = 2**20
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-training-cpu", "onnxruntime-training")
_COLUMNS = (
    "contestant",
    "ms / step",
    "min–max",
    "ratio",
    "rounds counted",
    "peak MiB",
    "ratio",
    "peak − imports MiB",
    "ratio",
    "idle MiB",
    "export s",
    "build s",
    "start s",
)
_MISSING = "–"


def markdown_table(records: list[Record], reference: str) -> str:
    """One row per contestant; the ratios are to the contestant named ``reference``."""
    base = next((item for item in records if item.contestant == reference and not item.error), None)
    rows = [
        "| " + " | ".join(_COLUMNS) + " |",
        "|---|" + "---:|" * (len(_COLUMNS) - 1),
        *(_row(record, base) for record in records),
    ]
    return "\n".join(rows)


def _row(record: Record, base: Record | None) -> str:
    if record.error is not None:
        reason = record.error.replace("|", "\\|").replace("\n", " ")
        cells = [record.contestant, f"failed: {reason}", *[_MISSING] * (len(_COLUMNS) - 2)]
        return "| " + " | ".join(cells) + " |"
    spread = record.spread_ms
    # A process without torch does not know what it takes of a GPU's memory.
    peak, working = (record.peak, record.working_memory) if record.peak else (None, None)
    cells = [
        record.contestant,
        _number(record.step_ms, 3),
        _MISSING if spread is None else f"{spread[0]:.3f}–{spread[1]:.3f}",
        _number(ratio(record.step_ms, base.step_ms if base else None), 2),
        f"{len(record.counted)}/{len(record.rounds)}",
        _number(None if peak is None else peak / _MIB, 0),
        _number(ratio(peak, base.peak if base else None), 2),
        _number(None if working is None else working / _MIB, 1),
        _number(ratio(working, base.working_memory if base else None), 2),
        _number(record.memory_built / _MIB, 0),
        _number(record.export_s, 1),
        _number(record.build_s, 1),
        _number(record.start_s, 1),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int) -> str:
    return _MISSING if value is None else f"{value:.{digits}f}"


def cpu_model() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of everything that the times depend on."""
    found = {"Python": platform.python_version()}
    for package in ("sam_export", "torch", "numpy", "onnx", "onnxscript", *_RUNTIMES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def markdown_page(
    sections: list[tuple[str, str, list[Record]]], reference: str, threads: int, legend: list[str]
) -> str:
    """The whole record.

    Args:
        sections: Name, description and records of each case.
        reference: Name of the contestant that ratios refer to.
        threads: Threads of every contestant.
        legend: One line per contestant.
    """
    cores = os.cpu_count()
    parts = [
        f"# Benchmark, {date.today().isoformat()}",
        "",
        f"- Machine: {cpu_model()}, {cores} cores, {platform.system()} {platform.release()}; "
        f"load average {os.getloadavg()[0]:.1f} at the end of the run",
        "- Versions: " + ", ".join(f"{name} {value}" for name, value in versions().items()),
        f"- Threads of each contestant: {threads}",
        "- Made by `scripts/bench`: one process per contestant, one at a time, interleaved round "
        f"by round; a round counts if its CPU time is at least {MIN_CPU_SHARE:.0%} of wall x "
        "threads; medians over the counted rounds; ratios are to `" + reference + "`.",
        "- Peak: largest resident memory during warm-up and rounds (building not counted); "
        "the process's resident memory after its imports is subtracted in the second column. "
        "Idle: resident after building and two steps, while no step runs: imports, state, and what "
        "building has left behind.",
        "- export: capture and export, in the parent; build: building or loading, and two "
        "steps; start: the same from the start of the process, with imports.",
        "",
        *(f"- {line}" for line in legend),
        "",
    ]
    for name, description, records in sections:
        parts += [f"## {name}", "", description, "", markdown_table(records, reference), ""]
    return "\n".join(parts)
