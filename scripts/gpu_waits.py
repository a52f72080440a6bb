"""Which calls inside a training step make the host wait for the device: torch's profiler says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

STEP = "sam_export.step"

CALLS = frozenset(
    {
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpy",
        "cudaStreamSynchronize",
        "cuCtxSynchronize",
        "cuEventSynchronize",
        "cuStreamSynchronize",
        "aten::_local_scalar_dense",
        "aten::nonzero",
    }
)
"""Calls of CUDA that return only when the device is done, and operators that need such a call
(on the CPU, only these can be seen)."""


def waits(
    step: Callable[..., Any], batches: Iterator[tuple[Any, Any]], steps: int, device: str
) -> dict[str, float]:
    """Calls that wait for the device, per step.

    Reading a loss between steps is the caller's business and not counted: only what lies inside
    the call of ``step`` is.

    Args:
        step: Runs one step on a batch; it has run before.
        batches: What it is fed.
        steps: How many steps to look at.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.

    Returns:
        Name of the call to its number per step.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            batch = next(batches)
            with record_function(STEP):
                step(*batch)
    events = profiler.events()
    assert events is not None
    # On CUDA a step has a second event, for the device's side, which ends when the device is done:
    # the profiler's own wait for that would lie in it.
    found = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CPU
    ]
    return counted(found, steps)


def counted(events: Iterable[tuple[str, float, float]], steps: int) -> dict[str, float]:
    """Calls of `CALLS` that begin inside a step, per step.

    Args:
        events: Name, start and end of every event on the host, in one unit of time.
        steps: How many steps there are among them.

    Raises:
        ValueError: The profiler has not recorded every step, so nothing can be said.
    """
    listed = list(events)
    spans = [(start, end) for name, start, end in listed if name == STEP]
    if len(spans) < steps:
        raise ValueError(f"The profiler recorded {len(spans)} of {steps} steps.")
    inside = Counter(
        name
        for name, start, _ in listed
        if name in CALLS and any(first <= start <= last for first, last in spans)
    )
    return {name: count / steps for name, count in sorted(inside.items())}
