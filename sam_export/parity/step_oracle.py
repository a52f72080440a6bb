"""The oracle of a `TrainStep`: its settings in the oracle's own words."""

from __future__ import annotations

from sam_export.parity.oracle import Oracle
from sam_export.parity.oracle_average import OracleAverage
from sam_export.parity.oracle_precision import OraclePrecision
from sam_export.parity.oracle_variants import OracleVariant
from sam_export.step.train_step import TrainStep
from sam_export.step.variants.asam import ASAM


def oracle_of(step: TrainStep) -> Oracle:
    """A fresh oracle where the step stands."""
    semantics, other = step.semantics, step.optimizer.perturbation
    return Oracle(
        step.model,
        step.loss_fn,
        step.optimizer.base_optimizer,
        num_targets=step.num_targets,
        running_stats=semantics.running_stats,
        randomness=semantics.randomness,
        generator=semantics.generator,
        seed=step.seed,
        step_count=step.step_count,
        on_nonfinite=semantics.on_nonfinite,
        decay_in_ascent=semantics.decay_in_ascent,
        norm_over=semantics.norm_over,
        adaptive=other.eta if isinstance(other, ASAM) else None,
        perturbation=None if isinstance(other, ASAM) else other,
        clip_norm=semantics.clip_norm,
        clip_value=semantics.clip_value,
        precision=OraclePrecision(
            step.autocast,
            None if step.loss_scaling is None else step.loss_scaling.to_dict(),
            step.loss_scale or 1.0,
            step.growth_tracker,
        ),
        micro_batches=semantics.micro_batches,
        perturbation_per=semantics.perturbation_per,
        variant=_oracle_variant(step),
        every=step.optimizer.every,
        ascent_steps=step.optimizer.ascent_steps,
        average=OracleAverage(step.ema.decay, step.averages) if step.ema else None,
    )


def _oracle_variant(step: TrainStep) -> OracleVariant:
    """The variant by name and numbers, with what it has kept so far."""
    variant = step.optimizer.variant
    made = OracleVariant(type(variant).__name__, **vars(variant))
    for name, parameter in step.model.named_parameters():
        for key, value in step.optimizer.memory.get(parameter, {}).items():
            made.kept.setdefault(key, {})[name] = value.detach().clone()
    return made
