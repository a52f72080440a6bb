"""Laws that a right step obeys, whatever its gradients are; each only where it holds.

They need no oracle of the same algorithm: a mistake that the oracle shared would show here. Whether
a law holds for a step is tried on eager in float64 first (that a loss is a mean, say, is not known
from its code); where it holds there, the target has to obey it within the bounds of a lock-step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from sam_export.parity.compare import Sample, metric_sample
from sam_export.parity.disturb import examples, map_batch, permuted
from sam_export.parity.oracle import Oracle
from sam_export.parity.oracle_batch import Batch
from sam_export.parity.oracle_once import loss_and_gradient
from sam_export.parity.panel import METRICS, Panel
from sam_export.parity.rollout import Run, compared_from
from sam_export.parity.tolerances import Tolerances
from sam_export.parity.verdict import floor_and_bound

HOLDS = 1e-10
"""Eager in float64 obeys a law to this, relative to the value, or the law does not hold for it:
about 1e6 roundings, where breaking it changes the loss in its first digits."""

_STEPS = (1e-3, 1e-4, 1e-5, 1e-6)
"""Lengths of the finite differences: truncation goes with the square, rounding with the inverse;
the best of them counts, so that a kink (ReLU) between two points does not."""

_DIFFERENCES = 1e-5
"""How well the best central difference agrees with a right gradient, relative to its norm: with
``h`` = 1e-5, rounding is eps / h = 2e-11 of the loss and truncation h^2 = 1e-10."""


@dataclass(frozen=True)
class Law:
    """What came of one law.

    Attributes:
        name: The law, as a sentence.
        verdict: ``ok``, ``FAIL``, or ``not applicable``.
        detail: What was found, or why it does not apply.
    """

    name: str
    verdict: Literal["ok", "FAIL", "not applicable"]
    detail: str


def laws_of_eager(panel: Panel) -> tuple[Law, ...]:
    """Finite differences of both gradients: is what autograd says the slope of the loss?

    In float64, along the gradient and along a random direction ``v`` of length 1::

        (L(w + h v) - L(w - h v)) / (2 h) = g . v

    A model with a wrong backward of its own fails here, though every target equals it.
    """
    name = "finite differences agree with the gradient at {}"
    if not panel.judge.is_double:
        return tuple(
            Law(name.format(where), "not applicable", "the model does not run in float64")
            for where in ("w", "w + eps")
        )
    laws = []
    point = dict(panel.start)
    for where in ("w", "w + eps"):
        laws.append(_differences(panel, point, name.format(where)))
        if where == "w":
            point = _perturbed(panel, point)
    return tuple(laws)


def laws_of_target(run: Run, panel: Panel, tol: Tolerances) -> tuple[Law, ...]:
    """All laws for one session, which is left in no particular state.

    Args:
        run: Its run, without an error so far.
        panel: The oracle runs.
        tol: The bounds.
    """
    laws: list[Callable[[Run, Panel, Tolerances], Law]] = [
        _radius,
        _base_optimizer,
        _doubled,
        _permuted,
        _not_finite,
    ]
    found = []
    for law in laws:
        name = (law.__doc__ or "").splitlines()[0].rstrip(".")
        try:
            result = law(run, panel, tol)
        except Exception as error:  # a crash too is an answer
            result = Law("", "FAIL", f"{type(error).__name__}: {error}")
        found.append(replace(result, name=name))
    return tuple(found)


def _radius(run: Run, panel: Panel, tol: Tolerances) -> Law:
    """The perturbation has the norm rho."""
    if panel.judge.perturbation is not None or panel.judge.adaptive is not None:
        return _not_applicable("the perturbation is another one than SAM's")
    if panel.parts > 1 and panel.judge.perturbation_per == "micro_batch":
        return _not_applicable("each part of the batch has a perturbation of its own")
    if panel.judge.ascent_steps > 1:
        return _not_applicable("several ascent steps do not go straight")
    radii = set(panel.rho)
    if len(radii) > 1:
        return _not_applicable("groups have different rho")
    this = panel.lock(panel.start, 0, panel.batch(0))
    size = this.judge.metrics["grad_norm"]
    if not this.eager.finite or not size > 1e-6:
        return _not_applicable("the gradient is zero or not finite")
    rho = radii.pop()
    found = compared_from(run, panel, panel.start, panel.batch(0), {}).metrics
    error = abs(found["perturbation_norm"] - rho * size / (size + 1e-12))
    bound = tol.kernel * float(np.finfo(panel.dtype).eps) * rho
    return _judged(error <= bound, f"{found['perturbation_norm']:.9g}, rho {rho:g}")


def _base_optimizer(run: Run, panel: Panel, tol: Tolerances) -> Law:
    """With rho = 0 the step is the base optimizer's."""
    if not _takes_rho(run.session):
        return _not_applicable("the session takes no rho")
    batch = panel.batch(0)
    with panel.radius(0.0):
        this = panel.lock(panel.start, 0, batch)
        if not this.eager.finite:
            return _not_applicable("the step is not finite")
        plain = panel.base_step(panel.start, batch)
        for name, value in this.judge.state.items():
            other = plain.get(name)
            if other is None or value.dtype.kind != "f" or name in panel.scaler:
                continue
            moved = np.linalg.norm(value - panel.start[name]) if name in panel.start else 1.0
            if float(np.linalg.norm(value - other)) > 1e-9 * max(float(moved), 1e-12):
                return _not_applicable(f"{name} of eager itself is another with two passes")
        stepped = compared_from(run, panel, panel.start, batch, {"rho": 0.0}, this)
    worst = _worst(stepped.samples, panel, tol)
    compared_from(run, panel, panel.start, batch, {"rho": panel.rho})  # rho stays set in a session
    if stepped.metrics["perturbation_norm"] != 0.0:
        return _judged(False, f"the perturbation has norm {stepped.metrics['perturbation_norm']:g}")
    return _judged(worst is None, worst or "every tensor within its bound")


def _doubled(run: Run, panel: Panel, tol: Tolerances) -> Law:
    """Repeating the batch does not change a mean loss."""
    batch = panel.batch(0)
    contract = getattr(run.session, "contract", None)
    if contract is not None and not contract.dims:
        return _not_applicable("the batch size is fixed")
    return _same_metrics(run, panel, tol, batch, _repeated(batch))


def _permuted(run: Run, panel: Panel, tol: Tolerances) -> Law:
    """The order of the examples does not matter."""
    batch = panel.batch(0)
    if examples(batch) < 2:
        return _not_applicable("one example has no order")
    return _same_metrics(
        run, panel, tol, batch, permuted(batch, np.random.default_rng(panel.seed), panel.parts)
    )


def _not_finite(run: Run, panel: Panel, tol: Tolerances) -> Law:
    """A batch with a NaN or an infinity is seen, and changes no weight."""
    if panel.on_nonfinite == "ignore":
        return _not_applicable("the semantics say to go on")
    for value in (math.nan, math.inf):
        batch, spoilt = _spoilt(panel.batch(0), value)
        if not spoilt:
            return _not_applicable("no input is a floating-point tensor")
        this = panel.lock(panel.start, 0, batch)
        if this.eager.finite:
            continue  # the model does not look at it, or masks it
        stepped = compared_from(run, panel, panel.start, batch, {}, this)
        worst = _worst(stepped.samples, panel, tol)
        if worst is not None:
            return _judged(False, f"with {value}: {worst}")
    return _judged(True, "neither changes anything")


def _same_metrics(run: Run, panel: Panel, tol: Tolerances, one: Batch, other: Batch) -> Law:
    """Losses and norms of two batches are the same, for eager in float64 and so for the target."""
    if panel.draws:
        return _not_applicable("the step draws random numbers")
    if not panel.judge.is_double:
        return _not_applicable("the model does not run in float64")
    first, second = (panel.lock(panel.start, 0, batch) for batch in (one, other))
    judges = [this.judge.metrics for this in (first, second)]
    for name in METRICS:
        values = [metrics[name] for metrics in judges]
        if not abs(values[0] - values[1]) <= HOLDS * abs(values[0]):
            return _not_applicable(f"{name} of eager itself is another")
    found = compared_from(run, panel, panel.start, other, {}).metrics
    for name in METRICS:
        eager = [each.metrics[name] for this in (first, second) for each in this.runs]
        wide = None if second.wide is None else second.wide.metrics[name]
        sample = metric_sample(judges[0][name], eager, found[name], panel.dtype, 1, wide)
        _, bound = floor_and_bound(
            sample, sample.noise, tol.relative(panel.dtype, "lock-step"), tol
        )
        if not sample.error <= bound:
            return _judged(False, f"{name} is {found[name]:.9g} instead of {judges[0][name]:.9g}")
    return _judged(True, "all metrics within their bounds")


def _differences(panel: Panel, point: Mapping[str, Any], name: str) -> Law:
    oracle, batch = panel.judge, panel.batch(0)
    _, gradient = _slope(panel, oracle, point, batch)
    size = math.sqrt(sum(float(np.vdot(g, g)) for g in gradient.values()))
    if not math.isfinite(size) or size == 0.0:
        return Law(name, "not applicable", "the gradient is zero or not finite")
    rng = np.random.default_rng([panel.seed, 11])
    random = {key: rng.standard_normal(g.shape) for key, g in gradient.items()}
    length = math.sqrt(sum(float(np.vdot(v, v)) for v in random.values()))
    directions = {
        "along the gradient": {key: g / size for key, g in gradient.items()},
        "along a random direction": {key: v / length for key, v in random.items()},
    }
    worst = 0.0
    for where, v in directions.items():
        exact = sum(float(np.vdot(gradient[key], v[key])) for key in v)
        errors = []
        for h in _STEPS:
            ends = []
            for sign in (1.0, -1.0):
                moved = {**point, **{key: point[key] + sign * h * v[key] for key in v}}
                ends.append(_slope(panel, oracle, moved, batch)[0])
            errors.append(abs((ends[0] - ends[1]) / (2 * h) - exact) / size)
        worst = max(worst, min(errors))
        if not min(errors) <= _DIFFERENCES:
            return Law(name, "FAIL", f"{where} they are off by {min(errors):.1e} of its norm")
    return Law(name, "ok", f"to {worst:.1e} of its norm")


def _slope(
    panel: Panel, oracle: Oracle, point: Mapping[str, Any], batch: Batch
) -> tuple[float, dict[str, Any]]:
    panel.seed_generators(0)
    oracle.load(point)
    return loss_and_gradient(oracle, batch)


def _perturbed(panel: Panel, point: Mapping[str, Any]) -> dict[str, Any]:
    """``w + rho g / ||g||``, with one rho: another point, where the second pass is."""
    _, gradient = _slope(panel, panel.judge, point, panel.batch(0))
    size = math.sqrt(sum(float(np.vdot(g, g)) for g in gradient.values())) + 1e-12
    rho = panel.rho[0]
    return {**point, **{key: point[key] + rho * g / size for key, g in gradient.items()}}


def _worst(samples: Mapping[str, Sample], panel: Panel, tol: Tolerances) -> str | None:
    """The first sample over its bound, for people; None where none is."""
    relative = tol.relative(panel.dtype, "lock-step")
    for name, sample in samples.items():
        _, bound = floor_and_bound(sample, sample.noise, relative, tol)
        if not sample.error <= bound:
            return f"{name} is off by {sample.error:.1e}, allowed {bound:.1e} {sample.note}".strip()
    return None


def _repeated(batch: Batch) -> Batch:
    count = examples(batch)

    def twice(value: Any) -> Any:
        if not len(value.shape) or len(value) != count:
            return value
        joined = torch.cat if isinstance(value, torch.Tensor) else np.concatenate
        return joined([value, value])

    return map_batch(batch, twice)


def _spoilt(batch: Batch, number: float) -> tuple[Batch, bool]:
    spoilt = False

    def change(value: Any) -> Any:
        nonlocal spoilt
        tensor = value.clone() if isinstance(value, torch.Tensor) else np.array(value)
        is_float = (
            tensor.is_floating_point()
            if isinstance(tensor, torch.Tensor)
            else tensor.dtype.kind == "f"
        )
        if is_float and not spoilt and len(tensor.shape):
            tensor.reshape(-1)[:1] = number
            spoilt = True
        return tensor

    return map_batch(batch, change), spoilt


def _takes_rho(session: Any) -> bool:
    parameters = inspect.signature(session.step).parameters
    return "rho" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _judged(good: bool, detail: str) -> Law:
    return Law("", "ok" if good else "FAIL", detail)


def _not_applicable(reason: str) -> Law:
    return Law("", "not applicable", reason)
