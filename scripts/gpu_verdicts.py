"""What a machine with a GPU is to show, and whether it did: plain numbers, no processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scripts.bench_contestants import CONTESTANTS, REFERENCE
from scripts.bench_records import Record, ratio

LAUNCH_BOUND = ("mlp", "digits_cnn", "vit")
"""Cases whose kernels are shorter than launching them takes."""

SPEED_UP = 1.5
"""`torch-compile`, recorded as a CUDA graph, is to be this many times as fast as eager SAM on each
of `LAUNCH_BOUND`."""

LARGE = "wide_resnet_28_10"
BASE_STEPS = 2.1
"""On `LARGE` a step of `torch-compile` may take this many compiled steps of the base optimizer."""

Word = Literal["yes", "NO", "not judged"]


@dataclass(frozen=True)
class Verdict:
    """One thing that was to be shown.

    Attributes:
        what: The thing.
        wanted: What was asked for.
        found: What was measured, or why nothing was.
        word: Whether it holds.
    """

    what: str
    wanted: str
    found: str
    word: Word


@dataclass(frozen=True)
class Parity:
    """The parity check of one target on one case.

    Attributes:
        case: Name of the case.
        target: Name of the target.
        ok: Whether it passed; None where it was not run.
        detail: The largest relative error of a change, or what went wrong.
    """

    case: str
    target: str
    ok: bool | None
    detail: str


def parity_verdicts(results: Sequence[Parity]) -> list[Verdict]:
    """One verdict per target, over all cases."""
    verdicts = []
    for target in dict.fromkeys(item.target for item in results):
        own = [item for item in results if item.target == target]
        failed = [f"{item.case}: {item.detail}" for item in own if item.ok is False]
        ran = [item for item in own if item.ok is not None]
        word: Word = "NO" if failed else "yes" if len(ran) == len(own) else "not judged"
        found = "; ".join(failed) or f"{len(ran)} of {len(own)} models equal"
        if not ran:
            found = own[0].detail
        verdicts.append(Verdict(f"parity of {target}", "every model equal to eager", found, word))
    return verdicts


def speed_verdicts(cases: Mapping[str, Sequence[Record]], device: str) -> list[Verdict]:
    """Times, memory and waits of every case that was measured.

    Args:
        cases: Name of the case to its records.
        device: On the CPU nothing is judged: the figures are for GPUs, and nothing waits there.
    """
    on_gpu = device != "cpu"
    verdicts = []
    for name in LAUNCH_BOUND:
        faster = _ratio(cases.get(name, ()), REFERENCE, "torch-compile-graph")
        verdicts.append(
            _judged(
                f"torch-compile-graph against {REFERENCE}, {name}",
                f"at least {SPEED_UP} times as fast",
                None if faster is None else f"{faster:.2f} times as fast",
                on_gpu,
                faster is not None and faster >= SPEED_UP,
            )
        )
    share = _ratio(cases.get(LARGE, ()), "torch-compile", "compiled-base")
    verdicts.append(
        _judged(
            f"torch-compile against compiled-base, {LARGE}",
            f"at most {BASE_STEPS} times its time",
            None if share is None else f"{share:.2f} times its time",
            on_gpu,
            share is not None and share <= BASE_STEPS,
        )
    )
    for name, records in cases.items():
        verdicts += _memory(name, records, on_gpu)
        verdicts += _waits(name, records, on_gpu)
    return verdicts


def same_work(case: str, complaints: Sequence[str]) -> Verdict:
    """Whether all contestants of a case ran, and trained alike; see `bench.check_same_work`."""
    what, wanted = f"contestants of {case} run, and begin with the same losses", "all"
    return Verdict(what, wanted, "; ".join(complaints) or "all", "NO" if complaints else "yes")


def _memory(case: str, records: Sequence[Record], on_gpu: bool) -> list[Verdict]:
    eager = next((item for item in records if item.contestant == REFERENCE), None)
    verdicts = []
    for item in records:
        if CONTESTANTS[item.contestant].target is None:
            continue
        share = ratio(item.peak, eager.peak) if eager is not None and item.peak else None
        found = None if share is None or item.error else f"{share:.2f} of it"
        verdicts.append(
            _judged(
                f"peak memory of {item.contestant}, {case}",
                f"at most that of {REFERENCE}",
                found,
                on_gpu,
                share is not None and share <= 1,
                item.error or "not known",
            )
        )
    return verdicts


def _waits(case: str, records: Sequence[Record], on_gpu: bool) -> list[Verdict]:
    verdicts = []
    for item in records:
        contestant = CONTESTANTS[item.contestant]
        if contestant.target is None or not contestant.tensors:
            continue
        found = None
        if item.waits is not None and not item.error:
            listed = [f"{name} {count:g} times" for name, count in item.waits.items()]
            found = ", ".join(listed) or "none"
        verdicts.append(
            _judged(
                f"calls in a step of {item.contestant} that wait for the device, {case}",
                "none",
                found,
                on_gpu,
                not item.waits,
                item.error or "not looked at",
            )
        )
    return verdicts


def _judged(
    what: str, wanted: str, found: str | None, applies: bool, holds: bool, why: str = "not measured"
) -> Verdict:
    if found is None:
        return Verdict(what, wanted, why, "not judged")
    if not applies:
        return Verdict(what, wanted, f"{found} (on the CPU)", "not judged")
    return Verdict(what, wanted, found, "yes" if holds else "NO")


def _ratio(records: Sequence[Record], over: str, under: str) -> float | None:
    times = {item.contestant: item.step_ms for item in records if item.error is None}
    return ratio(times.get(over), times.get(under))
