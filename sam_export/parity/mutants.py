"""The wrong steps that the parity check has to find: one table of the faults that real code has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ModelName = Literal["conv", "mlp"]

BOTH: tuple[ModelName, ...] = ("conv", "mlp")
CONV: tuple[ModelName, ...] = ("conv",)
MLP: tuple[ModelName, ...] = ("mlp",)


@dataclass(frozen=True)
class Mutant:
    """One fault of a SAM step.

    Attributes:
        name: A few words, for tables.
        what: What the wrong step does, next to what the right one does.
        models: The models of the self-test in which it is a fault; in the others it changes
            nothing (momentum in AdamW, statistics in a model without BatchNorm).
        options: Options of the base optimizer that the wrong step has instead of the right ones,
            where that is all of the fault.
    """

    name: str
    what: str
    models: tuple[ModelName, ...] = BOTH
    options: dict[str, Any] = field(default_factory=dict)


FLOAT32_BETAS = (0.8999999761581421, 0.9990000128746033)
"""0.9 and 0.999, rounded to float32."""

MUTANTS: tuple[Mutant, ...] = (
    # -- the perturbation --
    Mutant("no perturbation", "the second pass is at w: plain SGD, not SAM"),
    Mutant("wrong sign", "the second pass is at w - eps: it descends where SAM ascends"),
    Mutant("rho doubled", "the second pass is at w + 2 eps"),
    Mutant("rho of another group", "each group has the radius of the other one", MLP),
    Mutant("one rho for all groups", "every group has the radius of the first one", MLP),
    Mutant("per-tensor norm", "each gradient is divided by its own norm, not by the global one"),
    Mutant("norm per group", "each group's gradients are divided by the norm of that group", MLP),
    Mutant("squared norm", "gradients are divided by the squared norm"),
    Mutant("sum of norms", "gradients are divided by the sum of the tensors' norms"),
    Mutant("large epsilon", "1e-3 is added to the norm, not 1e-12"),
    Mutant("one tensor not perturbed", "the last parameter stays at w in the second pass"),
    Mutant("stale direction", "eps is along the momentum, not along this step's gradient", CONV),
    # -- the second pass --
    Mutant("first gradient reused", "the update takes the gradient at w"),
    Mutant("gradients added up", "the first gradient is not zeroed before the second pass"),
    Mutant("gradient times batch size", "the second gradient is of the sum over the batch"),
    Mutant("gradient in half precision", "the second gradient is rounded to float16"),
    Mutant("gradient transposed", "the gradient of one square matrix is transposed", MLP),
    Mutant("other dropout mask", "the second pass gives each example another one's mask", MLP),
    # -- the update --
    Mutant("w not restored", "the update starts from w + eps"),
    Mutant("one parameter not updated", "the last parameter keeps its value"),
    Mutant("frozen parameter moves", "a frozen parameter moves by two roundings"),
    Mutant("not a number", "one element of the last parameter becomes NaN"),
    Mutant("lr of another group", "each group has the learning rate of the other one", MLP),
    Mutant("decay dropped", "there is no weight decay", options={"weight_decay": 0.0}),
    Mutant("decay in every group", "a group without weight decay gets some", MLP,
           {"weight_decay": 0.05}),
    Mutant("decay coupled", "weight decay goes through the gradient: Adam, not AdamW", MLP,
           {"decoupled_weight_decay": False}),
    Mutant("Nesterov momentum", "the update looks ahead along the momentum", CONV,
           {"nesterov": True}),
    Mutant("dampened momentum", "the gradient enters the momentum times 0.1", CONV,
           {"dampening": 0.9}),
    Mutant("Adam's epsilon", "1e-6 is added to the root, not 1e-8", MLP, {"eps": 1e-6}),
    Mutant("betas in float32", "1 - beta^t is computed from betas rounded to float32", MLP,
           {"betas": FLOAT32_BETAS}),
    Mutant("bias correction stuck", "the correction is always that of the first step", MLP),
    # -- slots --
    Mutant("momentum dropped", "every step starts from slots of zero", CONV),
    Mutant("momentum reset", "the second step starts from slots of zero"),
    Mutant("stale slot", "the slots are not written back"),
    Mutant("swapped slots", "two parameters of one shape get each other's slots"),
    Mutant("swapped moments", "first and second moment are written into each other's place", MLP),
    Mutant("step counter stuck", "Adam's step counter is not written back", MLP),
    Mutant("random numbers repeat", "the number of the step does not advance", MLP),
    # -- running statistics --
    Mutant("statistics twice", "both passes update the running statistics", CONV),
    Mutant("batches counted twice", "num_batches_tracked advances by two", CONV),
    Mutant("statistics not updated", "the running statistics keep their values", CONV),
    Mutant("statistics' momentum", "the running statistics have momentum 0.2, not 0.1", CONV),
    Mutant("biased variance", "the running variance is divided by n, not by n - 1", CONV),
    # -- what is reported --
    Mutant("other loss reported", "loss is that of the second pass"),
    Mutant("perturbed loss is the loss", "perturbed_loss is that of the first pass"),
    Mutant("norm of the second gradient", "grad_norm is that of the second pass"),
    Mutant("missing root", "grad_norm is the sum of squares"),
    Mutant("finite always true", "a batch with NaN is said to be finite and is trained on"),
    Mutant("finite always false", "a right step is said not to be finite, and is skipped"),
)  # fmt: skip
"""Every fault, in the order of the step. Number ``i + 1`` selects ``MUTANTS[i]``; 0 is right."""

NUMBERS = {mutant.name: number for number, mutant in enumerate(MUTANTS, 1)}
"""Name to the value of the selector."""
