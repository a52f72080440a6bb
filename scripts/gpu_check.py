"""Checks everything that needs an NVIDIA GPU: libraries, parity, speed, memory, waits; one record.

On a machine without a GPU it ends after the report on the libraries, with exit code 2.
``--device cpu`` takes the same way on the CPU, as a trial of this program.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from sam_export.runtime.cuda_libraries import nvidia_gpus
from sam_export.runtime.detect import TARGETS, machine_status, require_provider, target_status
from scripts.bench import check_same_work, run_case
from scripts.bench_cases import CASES, Case
from scripts.bench_contestants import CONTESTANTS, RECORDED
from scripts.gpu_record import Section, library_report, page
from scripts.gpu_verdicts import (
    LARGE,
    LAUNCH_BOUND,
    Parity,
    Verdict,
    parity_verdicts,
    same_work,
    speed_verdicts,
)

ROOT = Path(__file__).resolve().parents[1]
PARITY_CASES = (*LAUNCH_BOUND, "wide_resnet", "gpt")
BENCH_CASES = (*LAUNCH_BOUND, LARGE)
EAGER = ("eager-sam", "eager-base", "compiled-base", "compiled-model")
PROFILED_STEPS = 5


def absent_targets(targets: Sequence[str], device: str) -> dict[str, str]:
    """Targets that cannot be exported to or run here, with the reason."""
    absent = {}
    for target in targets:
        status = target_status(target)
        reasons = [f"{item.what} is missing: {item.install}" for item in status.export + status.run]
        if not reasons and CONTESTANTS[target].tensors is False:
            try:
                require_provider(device)
            except Exception as error:  # each is a reason, for people
                reasons.append(str(error))
        if reasons:
            absent[target] = "; ".join(dict.fromkeys(reasons))
    return absent


def check_case(
    case: Case, targets: Sequence[str], steps: int, device: str, recorded: bool = False
) -> list[Parity]:
    """The parity of every target on one case, with model and oracle on the device.

    Args:
        case: The model.
        targets: Names of targets.
        steps: Of each rollout.
        device: Where.
        recorded: Whether steps are recorded as CUDA graphs; their rows say so.
    """
    from sam_export import CudaOptions, check_parity

    added = ", CUDA graph" if recorded else ""
    cuda = CudaOptions(cuda_graph=True) if recorded else None
    try:
        step, batches = case.recipe()
        step.model.to(device)
        report = check_parity(
            step, batches, targets=targets, num_steps=steps, device=device, cuda=cuda
        )
    except Exception as error:  # also CUDA's own, as of memory: a row of the record, not its end
        detail = f"the check itself failed: {type(error).__name__}: {error}"
        return [Parity(case.name, target + added, False, detail) for target in targets]
    results = []
    for target in report.targets:
        worst = max(target.lock_step, default=float("nan"))
        failed = [f"{row.name} ({row.mode})" for row in target.failed[:3]]
        failed += [f"law {law.name}" for law in target.broken]
        detail = target.error or (f"{worst:.1e}" if target.ok else ", ".join(failed))
        results.append(Parity(case.name, target.name + added, target.ok, detail))
    return results


def main(argv: list[str] | None = None) -> int:
    """Runs the check; 0: all that was judged holds, 1: something does not, 2: there is no GPU."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu to try it")
    parser.add_argument("--steps", type=int, default=10, help="steps of the parity check")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of the benchmark")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contestant")
    for flag, cases, names in (
        ("--parity-models", PARITY_CASES, "models of the parity check"),
        ("--bench-models", BENCH_CASES, "models of the benchmark"),
    ):
        known = [name for name, case in CASES.items() if not case.draws]
        parser.add_argument(
            flag, nargs="*", choices=known, default=list(cases), metavar="MODEL",
            help=f"{names} (default: {', '.join(cases)})",
        )  # fmt: skip
    parser.add_argument(
        "--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="TARGET",
        help=f"of {', '.join(TARGETS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="Markdown file (default: in docs/benchmarks/)")
    options = parser.parse_args(argv)
    if min(options.steps, options.rounds, options.threads) < 1:
        parser.error("--steps, --rounds and --threads must be 1 or more")

    # Every process of this check reads it, and all of NVIDIA's libraries obey it.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    device: str = options.device
    libraries = library_report(machine_status())
    print("\n".join(libraries), flush=True)
    problem = None if device == "cpu" else gpu_problem()
    if problem is not None:
        print(
            f"error: no NVIDIA GPU can be used here: {problem}. Nothing was checked; "
            "`--device cpu` tries this program out.",
            file=sys.stderr,
        )
        return 2
    absent = absent_targets(options.targets, device)
    for target, reason in absent.items():
        print(f"not run, {target}: {reason}", flush=True)
    present = [target for target in options.targets if target not in absent]

    graphs = [target for target in present if f"{target}-graph" in RECORDED and device != "cpu"]

    out: Path = options.out or unused_record(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    parity: list[Parity] = []
    sections: list[Section] = []
    alike: list[Verdict] = []

    def write() -> list[Verdict]:
        """The record of what is known so far: a machine may be gone before all of it is."""
        verdicts = parity_verdicts(parity) + alike
        verdicts += speed_verdicts({item.name: item.records for item in sections}, device)
        out.write_text(
            page(
                device, libraries, parity, options.steps, sections, options.rounds, verdicts, absent
            )
        )
        return verdicts

    for name in options.parity_models:
        print(f"parity of {name}", file=sys.stderr, flush=True)
        parity += check_case(CASES[name], present, options.steps, device) if present else []
        parity += [Parity(name, target, None, absent[target]) for target in absent]
        if graphs:
            parity += check_case(CASES[name], graphs, options.steps, device, recorded=True)
        write()
    names = (*EAGER, *present, *(f"{target}-graph" for target in graphs))
    contestants = [CONTESTANTS[name] for name in names]
    for name in options.bench_models:
        records = run_case(
            CASES[name], contestants, options.rounds, options.threads, device, PROFILED_STEPS
        )
        sections.append(Section(name, CASES[name].description, records))
        alike.append(same_work(name, check_same_work(records)))
        write()
    verdicts = write()
    for verdict in verdicts:
        print(f"{verdict.word}: {verdict.what}: {verdict.found}; wanted: {verdict.wanted}")
    print(f"Written to {out}")
    return 1 if any(verdict.word == "NO" for verdict in verdicts) else 0


def unused_record(device: str) -> Path:
    """A dated file for a record that is not there yet: each environment of a day has its own."""
    name = f"{date.today().isoformat()}-gpu-check-{device.partition(':')[0]}"
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (ROOT / "docs" / "benchmarks" / f"{name}{end}.md" for end in ends)
    return next(path for path in paths if not path.exists())


def gpu_problem() -> str | None:
    """Why torch cannot run on an NVIDIA GPU here; None where it can."""
    import torch

    _, problem = nvidia_gpus()
    if problem is None and not torch.cuda.is_available():
        built_for = torch.version.cuda or "the CPU only"
        problem = f"torch {torch.__version__} is built for {built_for} and sees none"
    return problem


if __name__ == "__main__":
    sys.exit(main())
