"""The record of `scripts/gpu_check` as Markdown: libraries, parity, benchmark, verdicts."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from sam_export.runtime.cuda_libraries import nvidia_gpus, package_of
from sam_export.runtime.detect import MachineStatus, onnxruntime_distributions
from scripts.bench_contestants import CONTESTANTS, REFERENCE
from scripts.bench_records import Record
from scripts.bench_table import cpu_model, markdown_table, versions
from scripts.gpu_verdicts import Parity, Verdict

CUDA_11 = (
    "libcublas.so.11",
    "libcudart.so.11.0",
    "libcudnn.so.8",
    "libcufft.so.10",
    "libcurand.so.10",
)
CUDA_13 = ("libcublas.so.13", "libcudart.so.13", "libcudnn.so.9", "libcurand.so.10")


@dataclass(frozen=True)
class Section:
    """One case of the benchmark: name, description and records."""

    name: str
    description: str
    records: list[Record]


def library_report(status: MachineStatus) -> list[str]:
    """Lines: GPUs, driver, torch's CUDA, every runtime, and what to install for the others."""
    gpus, problem = nvidia_gpus()
    lines = [f"GPUs: {', '.join(gpus) or f'none ({problem})'}", f"driver: {_driver()}", _torch()]
    for runtime in status.runtimes:
        if runtime.name == "torch":
            continue
        words = f"{runtime.name}: {runtime.version or 'not installed'}"
        if runtime.providers:
            words += f", with {', '.join(runtime.providers)}"
        for label, text in (("", runtime.problem), ("CUDA: ", runtime.cuda_problem)):
            words += f"; {label}{text}" if text else ""
        lines.append(words)
    # Two of them overwrite each other.
    present = " ".join(onnxruntime_distributions())
    first = f"pip uninstall -y {present} && " if present else ""
    lines.append(
        f"for onnx on CUDA 13 and cuDNN 9: {first}pip install onnxruntime-gpu "
        + _quoted(CUDA_13, 13)
        + " (Python 3.11 to 3.14; exact versions: constraints-cuda13.txt)"
    )
    lines.append(
        "for onnx-training and ort-artifacts on CUDA 11.8 and cuDNN 8: "
        f"{first}pip install onnxruntime-training==1.19.2 "
        + _quoted(CUDA_11, 11)
        + " (Python 3.11; exact versions: constraints-cuda11.txt)"
    )
    return lines


def page(
    device: str,
    libraries: Sequence[str],
    parity: Sequence[Parity],
    steps: int,
    sections: Sequence[Section],
    rounds: int,
    verdicts: Sequence[Verdict],
    absent: dict[str, str],
) -> str:
    """The whole record.

    Args:
        device: Where the targets ran.
        libraries: What `library_report` says.
        parity: One result per case and target.
        steps: Steps of the parity check.
        sections: The benchmark.
        rounds: Rounds that were to count.
        verdicts: What was to be shown.
        absent: Targets that cannot run here, with the reason.
    """
    on_gpu = device != "cpu"
    clock = "CUDA events" if on_gpu else "the wall clock"
    memory = (
        "device memory that torch's allocator has reserved; not known for contestants without torch"
        if on_gpu
        else "resident memory of the process"
    )
    kind = "" if on_gpu else ": a trial on the CPU, which says nothing about a GPU"
    names = dict.fromkeys(item.contestant for section in sections for item in section.records)
    return "\n".join(
        [
            f"# GPU check, {date.today().isoformat()}, device {device}{kind}",
            "",
            f"- Machine: {cpu_model()}, {os.cpu_count()} cores, {platform.system()} "
            f"{platform.release()}; load average {os.getloadavg()[0]:.1f} at the end of the run",
            "- Versions: " + ", ".join(f"{name} {value}" for name, value in versions().items()),
            *(f"- {line}" for line in libraries),
            "- Made by `scripts/gpu_check`. TF32 was off (`NVIDIA_TF32_OVERRIDE=0`).",
            *(f"- Not run, `{target}`: {reason}" for target, reason in absent.items()),
            "",
            "## What was to be shown",
            "",
            "| | wanted | found | |",
            "|---|---|---|---|",
            *(f"| {v.what} | {v.wanted} | {_cell(v.found)} | {v.word} |" for v in verdicts),
            "",
            "## Parity with eager",
            "",
            f"`sam_export.check_parity`, float32, {steps} steps, model and oracle on {device}; the "
            "largest relative error of a step's change, in lock-step.",
            "",
            "| model | target | equal | |",
            "|---|---|---|---|",
            *(
                f"| {item.case} | {item.target} | {_word(item.ok)} | {_cell(item.detail)} |"
                for item in parity
            ),
            "",
            "## Benchmark",
            "",
            f"One process per contestant, interleaved round by round, medians of at least {rounds} "
            f"rounds; time by {clock} (contestants without torch: the wall clock), batches of "
            f"those with torch on the device already. Memory: {memory}.",
            "",
            *(f"- `{name}`: {CONTESTANTS[name].description}" for name in names),
            "",
            *(line for section in sections for line in _section(section)),
        ]
    )


def _section(section: Section) -> list[str]:
    table = markdown_table(section.records, REFERENCE)
    return [f"### {section.name}", "", section.description, "", table, ""]


def _word(ok: bool | None) -> str:
    return "not run" if ok is None else "yes" if ok else "NO"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _quoted(libraries: Sequence[str], cuda: int) -> str:
    return " ".join(f'"{package_of(library, cuda)}"' for library in libraries)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not say ({type(error).__name__})"
    return "; ".join(done.stdout.split("\n")).strip("; ")


def _torch() -> str:
    import torch

    return (
        f"torch: {torch.__version__}, built for CUDA {torch.version.cuda or 'no version'}, "
        f"{'sees' if torch.cuda.is_available() else 'does not see'} a GPU"
    )
