"""What one SAM step means where libraries differ silently."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from sam_export.errors import StepConfigError


@dataclass(frozen=True)
class Semantics:
    """The choices that define one SAM step (section 4 of the design).

    Attributes:
        running_stats: Which pass updates running statistics (BatchNorm and other buffers):
            ``"ascent"`` (the pass at ``w`` only, as in the authors' code) or ``"both"`` (what a
            plain two-pass loop does).
        randomness: ``"same"``: both passes see the same random draw (dropout masks), so that the
            perturbation is a step on the function whose gradient follows; ``"fresh"``: each pass
            draws anew.
        generator: Where random numbers come from. ``"philox"``: a counter-based generator keyed
            by (seed, step, draw), whose numbers every target draws alike, bit for bit; seed and
            step number are part of the state. ``"torch"``: torch's own generators, as in any eager
            loop; only the torch targets have them, and they are not part of the state.
        on_nonfinite: What happens when a loss or a gradient norm of either pass is not finite.
            ``"skip"``: no state changes (but for the step number that random numbers are drawn
            with) and ``StepResult.finite`` is false; ``"raise"``: nothing changes and an error is
            raised; ``"ignore"``: the update is applied regardless.
        decay_in_ascent: Whether ``weight_decay * w`` is part of the gradient that is ascended
            (the authors' code has the decay inside the loss); the base update decays either way.
        norm_over: Which gradients the norm of the perturbation is over: ``"all"``, or
            ``"perturbed"``: those of parameters whose group has ``rho != 0``, so that ``eps_w`` has
            the norm ``rho`` where only some layers are perturbed (SAM-ON: only normalization
            layers). ``StepResult.grad_norm`` is over all in either case.
        clip_norm: Largest L2 norm of ``g_adv``, over all parameters: it is scaled by
            ``clip_norm / (norm + 1e-6)`` where that is less than 1, as
            `torch.nn.utils.clip_grad_norm_` does. None: no clipping.
        clip_value: Largest magnitude of an element of ``g_adv``, as
            `torch.nn.utils.clip_grad_value_`. With either, ``StepResult.perturbed_grad_norm`` is
            the norm before clipping.
        micro_batches: Into how many equal, consecutive parts a step splits its batch, inside the
            graph. Parts go through the model one after the other; loss and gradients are means
            over the parts. See `step.micro_batches`.
        perturbation_per: With several parts: ``"batch"``: one perturbation, from the mean of the
            parts' gradients, for all of them: the unsplit step, in less memory.
            ``"micro_batch"``: each part is perturbed by its own gradient, and the update gets the
            mean of the parts' ``g_adv`` (m-sharpness, with ``m`` the examples of a part).

    Raises:
        StepConfigError: A field has a value that is not listed here.

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently
        Improving Generalization", 2021, https://arxiv.org/abs/2010.01412 (m-sharpness: section
        4.1); SAM-ON: Mueller, Vlaar,
        Rolnick, Hein, "Normalization Layers Are All That Sharpness-Aware Minimization Needs", 2023,
        https://arxiv.org/abs/2306.04226
    """

    running_stats: Literal["ascent", "both"] = "ascent"
    randomness: Literal["same", "fresh"] = "same"
    generator: Literal["philox", "torch"] = "philox"
    on_nonfinite: Literal["skip", "raise", "ignore"] = "skip"
    decay_in_ascent: bool = False
    norm_over: Literal["all", "perturbed"] = "all"
    clip_norm: float | None = None
    clip_value: float | None = None
    micro_batches: int = 1
    perturbation_per: Literal["batch", "micro_batch"] = "batch"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("clip_norm", "clip_value"):
                _check_clip(field.name, value)
                continue
            if field.name == "micro_batches":
                _check_count(field.name, value)
                continue
            allowed = (True, False) if hints[field.name] is bool else get_args(hints[field.name])
            if not any(value is choice or value == choice for choice in allowed):
                raise StepConfigError(
                    f"Semantics({field.name}={value!r}): expected one of "
                    f"{', '.join(repr(choice) for choice in allowed)}."
                )

    @property
    def clips(self) -> bool:
        """Whether ``g_adv`` is clipped."""
        return self.clip_norm is not None or self.clip_value is not None

    @property
    def perturbs_each_part(self) -> bool:
        """Whether there are several perturbations in one step, one for each part of the batch."""
        return self.micro_batches > 1 and self.perturbation_per == "micro_batch"

    @classmethod
    def eager_loop(cls) -> Semantics:
        """The semantics of the classic two-pass PyTorch loop, bit for bit.

        Both passes update running statistics, each draws its own dropout masks from torch's
        generator, and nothing looks at whether the values are finite.
        """
        return cls(
            running_stats="both", randomness="fresh", generator="torch", on_nonfinite="ignore"
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Semantics:
        """The inverse of `to_dict`; an unknown field is an error, since it would change meaning."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise StepConfigError(
                f"Unknown semantics {', '.join(unknown)}: made by a newer version of sam_export?"
            )
        return cls(**values)


def _check_clip(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and math.isfinite(value) and value > 0):
        raise StepConfigError(
            f"Semantics({name}={value!r}): expected a finite number above 0, or None."
        )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StepConfigError(f"Semantics({name}={value!r}): expected an integer of at least 1.")
