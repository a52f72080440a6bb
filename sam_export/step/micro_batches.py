"""A batch in several parts: how it is divided, and a perturbation for each part (m-sharpness)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sam_export._compat.tracing import same_size
from sam_export.artifact.semantics import Semantics
from sam_export.errors import StepConfigError
from sam_export.step.gradient import Parts, joined
from sam_export.step.kind import Group
from sam_export.step.norms import global_norm
from sam_export.step.passes import Passes, clipped, two_passes
from sam_export.step.sam import SAM


def split(names: Sequence[str], values: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """The tensors of each part of a batch: equal, consecutive parts of dimension 0.

    What the first tensor has in dimension 0 is the size of the batch. A tensor whose dimension 0
    has that size is divided; any other one (a mask for all examples, a scalar) goes to every part.

    Args:
        names: Of the tensors, for messages.
        values: The tensors; one that is symbolic is divided if it has the same symbol.
        count: How many parts.

    Raises:
        StepConfigError: The size of the batch is no multiple of ``count``.
    """
    if count == 1:
        return [list(values)]
    size = values[0].shape[0] if values[0].dim() else 0
    if size == 0 or size % count:
        raise StepConfigError(
            f"micro_batches={count}: dimension 0 of {names[0]!r} is the size of the batch and must "
            f"be a multiple of {count}; its shape is {list(values[0].shape)}. Leave the last "
            "examples out, or choose another number of parts."
        )
    divided = [
        value.unflatten(0, (count, size // count)).unbind()
        if is_divided(value, values[0])
        else [value] * count
        for value in values
    ]
    return [list(part) for part in zip(*divided, strict=True)]


def waiting(whole: Tensor, part: Tensor, number: int, before: Sequence[Tensor]) -> Tensor:
    """Part ``number`` of a tensor, as a value that depends on all of ``before``.

    A graph has no order but that of what depends on what, and a runtime that is free to do so
    runs the first passes of all parts before the first backward pass (ONNX Runtime does), and then
    holds the activations of all. The number of the part has a zero added that is made of one
    element of each tensor, by logic: NaN and infinity give zero, too, and no runtime can know it.

    Args:
        whole: The tensor that is divided.
        part: The part, as a view.
        number: Which one it is.
        before: Gradients that have to be there.
    """
    if not before:
        return part
    firsts = [value.flatten()[0].to(before[0]) for value in before if value.numel()]
    seen = torch.stack(firsts).sum()
    zero = ((seen != seen) & (seen == seen)).long().reshape(1)
    size = part.shape[0]
    rows = whole.unflatten(0, (whole.shape[0] // size, size))
    selected: Tensor = rows.index_select(0, zero + number).squeeze(0)
    return selected


def is_divided(value: Tensor, first: Tensor) -> bool:
    """Whether a tensor of a batch has the size of the batch in dimension 0."""
    return value.dim() > 0 and same_size(value.shape[0], first.shape[0])


def check_micro_batches(semantics: Semantics, optimizer: SAM) -> None:
    """Refuses what has no meaning with a perturbation per part.

    Raises:
        StepConfigError: The variant keeps one tensor per parameter from step to step, and there
            would be one for each part; or draws of torch's generator cannot be paired.
    """
    if semantics.perturbs_each_part and optimizer.variant.keys:
        raise StepConfigError(
            f"{optimizer.variant.name} remembers one {' and one '.join(optimizer.variant.keys)} "
            "of each parameter from step to step; with perturbation_per='micro_batch' each part of "
            "a batch would have another one. Use perturbation_per='batch'."
        )
    is_torchs = (semantics.generator, semantics.randomness) == ("torch", "same")
    if semantics.perturbs_each_part and optimizer.ascent_steps > 1 and is_torchs:
        raise StepConfigError(
            "Several ascent steps of each part of a batch cannot be given the same draws of "
            "torch's own generator in a graph. Use generator='philox', or randomness='fresh'."
        )


def perturbed_passes(
    objectives: Parts,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    groups: Sequence[Group],
    rho: Sequence[float | Tensor],
    semantics: Semantics,
    at: Callable[[str], None] = lambda stage: None,
    stages: dict[str, Tensor] | None = None,
    **others: Any,
) -> Passes:
    """The passes of a step of SAM, with one perturbation or one for each part of the batch.

    With one it is `two_passes`, whose gradients are means over the parts. Otherwise, ``j`` over
    the ``k`` parts and one after the other::

        loss_j, g_j, eps_j, perturbed_loss_j, g_adv_j = two_passes of part j
        loss, perturbed_loss = mean_j loss_j, mean_j perturbed_loss_j
        grad_norm            = ||mean_j g_j||           # as that of the unsplit step
        perturbation_norm    = mean_j ||eps_j||
        g_adv                = mean_j g_adv_j           # and then it is clipped

    Buffers go from part to part: the ascent pass of a part begins with what the part before left,
    its descent pass too if ``semantics.running_stats`` is ``"both"``.

    Args:
        objectives: The loss of each part.
        parameters: As in `two_passes`, and so for what follows.
        buffers: All buffers by name.
        groups: The parameters to train.
        rho: Radius of each group.
        semantics: What one step means.
        at: Told the name of each stage, and ``part`` before each part that has its own
            perturbation.
        stages: Gets gradients and perturbations by name; with several, their means.
        **others: As in `two_passes`.

    Source: Foret et al., 2021, https://arxiv.org/abs/2010.01412, section 4.1.
    """
    if not semantics.perturbs_each_part:
        return two_passes(
            objectives, parameters, buffers, groups, rho, semantics, at=at, stages=stages, **others
        )
    unclipped = replace(semantics, clip_norm=None, clip_value=None)
    ascended, adversarial = _Mean(), _Mean()
    shown = _Mean() if stages is not None else None
    metrics = _Mean()
    are_finite, outputs = [], []
    before: list[Tensor] = []
    for number in objectives.numbers:
        at("part")
        own: dict[str, Tensor] | None = None if stages is None else {}
        part = two_passes(
            objectives.alone(number, before),
            parameters,
            buffers,
            groups,
            rho,
            unclipped,
            at=at,
            stages=own,
            **others,
        )
        buffers = part.buffers
        ascended.add(part.ascended)
        adversarial.add(part.gradients)
        if shown is not None and own is not None:
            shown.add(own)
        metrics.add({name: getattr(part, name) for name in _AVERAGED})
        are_finite.append(torch.isfinite(part.grad_norm))
        outputs.append(part.outputs)
        before = [*ascended.sums(), *adversarial.sums()]
    at("check")
    count = len(objectives.numbers)
    final = adversarial.of(count)
    norm = global_norm(list(final.values()))
    grad_norm = global_norm(list(ascended.of(count).values()))
    means = metrics.of(count)
    are_finite += [torch.isfinite(v) for v in (*means.values(), grad_norm, norm)]
    if stages is not None and shown is not None:
        stages |= shown.of(count)
    return Passes(
        loss=means["loss"],
        perturbed_loss=means["perturbed_loss"],
        perturbation_norm=means["perturbation_norm"],
        grad_norm=grad_norm,
        finite=torch.stack(are_finite).all(),
        gradients=clipped(final, norm, semantics),
        buffers=dict(buffers),
        outputs=joined(outputs),
        perturbed_grad_norm=norm if semantics.clips else None,
    )


_AVERAGED = ("loss", "perturbed_loss", "perturbation_norm")


class _Mean:
    """Means of tensors by name; one that a part lacks counts as 0 there."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the tensors of one part."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def sums(self) -> list[Tensor]:
        """What has been added up so far."""
        return list(self._sums.values())

    def of(self, count: int) -> dict[str, Tensor]:
        """The means over ``count`` parts."""
        return {name: value / count for name, value in self._sums.items()}
