"""`TrainStep`: model, loss and SAM optimizer as one training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sam_export.artifact.loss_scaling import LossScaling
from sam_export.artifact.result import StepResult
from sam_export.artifact.semantics import Semantics
from sam_export.errors import StepConfigError
from sam_export.step.average import EMA, check_ema, load_averages
from sam_export.step.batch import BatchLayout, layout_of, unwrapped
from sam_export.step.call import call_with
from sam_export.step.draws import Draws
from sam_export.step.generators import Generators
from sam_export.step.gradient import Objective, Parts
from sam_export.step.hyper import hyper_of
from sam_export.step.kind import Group
from sam_export.step.loss_checks import check_loss, refuse_reentrant
from sam_export.step.loss_scaling import Scaler
from sam_export.step.micro_batches import check_micro_batches, perturbed_passes, split, waiting
from sam_export.step.mixed_precision import (
    autocasting,
    check_master_weights,
    check_precision,
    widened,
)
from sam_export.step.passes import Passes, one_pass
from sam_export.step.perturbation import name_of
from sam_export.step.pure import pure_step
from sam_export.step.sam import SAM
from sam_export.step.update import Slots


class TrainStep(nn.Module):
    """One SAM training step of a model: both passes, perturbation and base update.

    Called on a batch it runs the step eagerly, in place, on the model and the optimizer::

        result = step(x, y)

    `pure` is the same step as a function ``(state, hyper, batch) -> (outputs, state)``; `capture`
    turns that into one graph.

    Args:
        model: Any module. It runs in the mode (train, eval) that its submodules are in.
        loss_fn: ``loss_fn(output, *targets)`` gives a scalar. None: the model returns the loss.
        optimizer: A `SAM` over (some of) the model's parameters; it is the configuration.
        num_targets: How many entries at the end of a batch go to the loss.
        semantics: The choices that define a step.
        seed: Of the random numbers that the step draws, 64 bits; None takes the seed of torch's
            generator (`torch.manual_seed`).
        autocast: ``torch.float16`` or ``torch.bfloat16``: model and loss of both passes run under
            `torch.autocast`, as ``with torch.autocast(device_type, dtype):`` around them would.
            Weights, gradients and update stay float32, and so do the loss and the outputs that a
            step returns. None: the dtypes of the model.
        loss_scaling: Scale the loss before it is differentiated and divide both gradients by the
            scale; a step that overflows is skipped and lowers it. None: no scale.

    Attributes:
        seed: The seed in use.
        step_count: Steps run so far, skipped ones included: the number of the next step. It is
            part of `state_dict`, like the seed.
        averages: With ``ema``, the averages so far, by name, part of `state_dict`; `load_averages`
            puts them into a model.
        loss_scale: With loss scaling, the scale of the next step, and
        growth_tracker: how many steps it has been right; both are part of `state_dict`.

    Raises:
        StepConfigError: The optimizer is not a `SAM`, has a parameter that is not the model's,
            nothing is left to train, the seed has more than 64 bits, or the settings of mixed
            precision do not go together (see `step.mixed_precision`).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        optimizer: SAM,
        num_targets: int = 1,
        semantics: Semantics | None = None,
        seed: int | None = None,
        autocast: torch.dtype | None = None,
        loss_scaling: LossScaling | None = None,
        ema: EMA | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(optimizer, SAM):
            raise StepConfigError(
                f"optimizer is a {type(optimizer).__name__}; expected sam_export.SAM, as in "
                "SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)."
            )
        if num_targets < 0:
            raise StepConfigError(f"num_targets={num_targets}: it cannot be negative.")
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.num_targets = num_targets
        self.semantics = semantics or Semantics()
        if optimizer.perturbation is not None and self.semantics.norm_over != "all":
            raise StepConfigError(
                f"norm_over={self.semantics.norm_over!r} is about the norm of SAM's own "
                f"perturbation; {name_of(optimizer.perturbation)} has another. Leave one out."
            )
        check_micro_batches(self.semantics, optimizer)
        self.seed = _signed(torch.initial_seed() if seed is None else seed)
        self.step_count = 0
        check_precision(autocast, loss_scaling, self.semantics)
        self.autocast = autocast
        self.loss_scaling = loss_scaling
        self.loss_scale = float(loss_scaling.init_scale) if loss_scaling else None
        self.growth_tracker = 0
        check_ema(ema)
        self.ema = ema
        self._draws_nothing = False
        self._was_looked_at = False
        trained = [name for names in self.group_names() for name in names]
        self.averages = ema.first(model, trained) if ema else {}
        self.check_master_weights()

    def group_names(self) -> list[list[str]]:
        """Names of the trained parameters, per parameter group of the optimizer.

        A parameter is trained when it is in the optimizer and requires a gradient. A tied
        parameter occurs once, under its first name.

        Raises:
            StepConfigError: A parameter of the optimizer is not the model's, or none is trained.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = []
        for index, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                if id(p) not in names:
                    raise StepConfigError(
                        f"Parameter group {index} of the optimizer holds a tensor of shape "
                        f"{list(p.shape)} that is no parameter of {type(self.model).__name__}. "
                        "Make the optimizer from this model's parameters() (a loss with parameters "
                        "belongs into the model)."
                    )
            groups.append([names[id(p)] for p in group["params"] if p.requires_grad])
        if not any(groups):
            raise StepConfigError(
                f"{type(self.model).__name__} has no trainable parameter in the optimizer: every "
                "one is frozen (requires_grad is False) or missing. There is nothing to train."
            )
        return groups

    def groups(self) -> list[Group]:
        """Names and weight decay of each parameter group."""
        decays = [group.get("weight_decay", 0.0) for group in self.optimizer.param_groups]
        return [
            Group(tuple(names), float(decay))
            for names, decay in zip(self.group_names(), decays, strict=True)
        ]

    def memory(self) -> dict[str, dict[str, Tensor]]:
        """What the SAM variant keeps of each trained parameter, by name and key; zeros at first."""
        keys, kept = self.optimizer.variant.keys, self.optimizer.memory
        named = dict(self.model.named_parameters())
        names = [name for part in self.group_names() for name in part] if keys else []
        return {
            name: dict(
                kept.get(named[name]) or {key: torch.zeros_like(named[name]) for key in keys}
            )
            for name in names
        }

    def hyper(self, names: Sequence[str] = ("lr", "rho")) -> dict[str, list[float]]:
        """Current hyper-parameters of each parameter group; see `step.hyper.hyper_of`."""
        return hyper_of(self.optimizer, names)

    def layout(self, batch: Sequence[Any] | Mapping[str, Any]) -> BatchLayout:
        """How a batch like this one is divided into inputs and targets."""
        return layout_of(self.model, self.loss_fn, self.num_targets, batch)

    def objective(self, layout: BatchLayout, values: Sequence[Tensor]) -> Objective:
        """The loss of one batch as a function of parameters and buffers."""

        def evaluate(
            parameters: Mapping[str, Tensor],
            buffers: Mapping[str, Tensor],
            use: Callable[[Tensor, Any], Any],
        ) -> Any:
            def run() -> Any:
                with self.autocasting():
                    outputs = layout.call(self.model, values)
                    loss = (
                        outputs
                        if self.loss_fn is None
                        else self.loss_fn(outputs, *values[len(layout.inputs) :])
                    )
                check_loss(loss, self.loss_fn is None)
                if self.autocast is not None:
                    loss, outputs = widened((loss, outputs))
                if not self._was_looked_at:
                    refuse_reentrant(loss)
                    self._was_looked_at = True
                return use(loss, outputs)

            return call_with(self.model, {**parameters, **buffers}, run)

        return evaluate

    def objectives(
        self,
        layout: BatchLayout,
        values: Sequence[Tensor],
        wrapped: Callable[[Objective], Objective] = lambda objective: objective,
        in_order: bool = False,
    ) -> Parts:
        """The loss of each part of a batch, see `step.micro_batches`.

        Args:
            layout: How the batch is divided into inputs and targets.
            values: The batch.
            wrapped: Applied to each objective.
            in_order: Whether a part's values depend on what must be computed before them.
        """
        parts = split(layout.names, values, self.semantics.micro_batches)

        def make(number: int, before: Sequence[Tensor]) -> Objective:
            part = parts[number]
            if in_order:
                part = [
                    own if own is whole else waiting(whole, own, number, before)
                    for whole, own in zip(values, part, strict=True)
                ]
            return wrapped(self.objective(layout, part))

        return Parts(make, range(len(parts)))

    def pure(
        self, *state_and_batch: Any, **options: Any
    ) -> tuple[Passes, dict[str, Tensor], Slots]:
        """The whole step as a function of its arguments, see `step.pure.pure_step`."""
        return pure_step(self, *state_and_batch, **options)

    @torch.compiler.disable(  # type: ignore[untyped-decorator,no-untyped-call]
        reason="TrainStep calls the eager optimizer; use sam_export.capture(step, batch) and "
        "sam_export.load(captured, target='torch-compile') for a compiled step"
    )
    def forward(self, *batch: Any, **named: Any) -> StepResult:
        """One eager step, in place on the model and the optimizer.

        Args:
            *batch: Tensors (inputs, then targets), or one dict of tensors.
            **named: The same as a dict, by keyword.

        Returns:
            The step's results as tensors.

        Raises:
            StepConfigError: The batch does not fit, the loss is no scalar, or a value is not
                finite and ``semantics.on_nonfinite`` is ``"raise"``; nothing has changed then.
        """
        given = unwrapped(batch) if batch else named
        layout = self.layout(given)
        values = layout.tensors(given)
        parameters = dict(self.model.named_parameters())
        buffers = dict(self.model.named_buffers())
        generators = Generators(parameters.values())
        self.check_master_weights()
        device = next(iter(parameters.values())).device
        scaler = self.scaler(device)

        def run(at: Callable[[str], None]) -> Passes:
            objectives = self.objectives(layout, values)
            detached = {name: p.detach() for name, p in parameters.items()}
            kind, memory = self.optimizer.kind, self.memory()
            if self.step_count % self.optimizer.every:
                return one_pass(
                    objectives, detached, buffers, self.groups(), self.semantics,
                    at=at, kind=kind, memory=memory, scaler=scaler,
                )  # fmt: skip
            started = torch.tensor(int(bool(self.optimizer.memory)), device=device)
            return perturbed_passes(
                objectives, detached, buffers, self.groups(), self.hyper(["rho"])["rho"],
                self.semantics, at=at, kind=kind, memory=memory, started=started, scaler=scaler,
            )  # fmt: skip

        with torch.no_grad():
            passes: Passes | None = None
            if self.semantics.generator == "torch":
                again = self.semantics.randomness == "same"
                passes = run(generators.rewind_for_pass if again else lambda stage: None)
            elif self._draws_nothing:
                # Without `Draws`, which costs a call to Python for every operator.
                passes = run(lambda stage: None)
                if generators.have_moved():
                    generators.rewind()
                    passes = None
            if passes is not None:
                self._finish(parameters, buffers, passes)
            else:
                with self.draws(device) as draws:
                    passes = run(draws.at)
                    self._finish(parameters, buffers, passes)
                self._draws_nothing = draws.count == 0
        self.step_count += 1
        self.optimizer.count = self.step_count
        if scaler is not None:
            scale, tracker = scaler.after(passes.finite)
            self.loss_scale, self.growth_tracker = float(scale), int(tracker)
        return StepResult(
            loss=passes.loss,
            perturbed_loss=passes.perturbed_loss,
            grad_norm=passes.grad_norm,
            perturbation_norm=passes.perturbation_norm,
            finite=passes.finite,
            outputs=passes.outputs,
            perturbed_grad_norm=passes.perturbed_grad_norm,
            loss_scale=None if scaler is None else scaler.shown,
        )

    def check_master_weights(self) -> None:
        """With mixed precision, refuses weights that are not float32: `StepConfigError`."""
        named = self.model.named_parameters()
        check_master_weights(named, self.autocast, self.loss_scaling)

    def autocasting(self) -> AbstractContextManager[Any]:
        """Inside, operators compute in the dtype that the step casts to."""
        return autocasting(self.model, self.autocast)

    def scaler(self, device: torch.device) -> Scaler | None:
        """The scale of the next step; None without loss scaling."""
        if self.loss_scaling is None:
            return None
        scale = torch.tensor(self.loss_scale, dtype=torch.float32, device=device)
        tracker = torch.tensor(self.growth_tracker, device=device)
        return Scaler(self.loss_scaling, scale, tracker)

    def draws(self, device: torch.device) -> Draws:
        """The random numbers of the next step."""
        seed, number = (torch.tensor(n, device=device) for n in (self.seed, self.step_count))
        return Draws(seed, number, same=self.semantics.randomness == "same")

    def load_averages(self, model: nn.Module) -> None:
        """Copies the averaged weights and buffers into a model like the step's, to evaluate it."""
        load_averages(self.averages, model)

    def get_extra_state(self) -> dict[str, Any]:
        """Seed, step number, scale of the loss and averages, for `state_dict`."""
        state: dict[str, Any] = {"seed": self.seed, "step_count": self.step_count}
        if self.loss_scaling is not None:
            state |= {"loss_scale": self.loss_scale, "growth_tracker": self.growth_tracker}
        if self.ema is not None:
            state["averages"] = dict(self.averages)
        return state

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `get_extra_state`.

        A step with loss scaling keeps its own scale where the state has none.
        """
        self.seed, self.step_count = state["seed"], state["step_count"]
        if self.loss_scaling is not None and "loss_scale" in state:
            self.loss_scale = float(state["loss_scale"])
            self.growth_tracker = int(state["growth_tracker"])
        for name, value in state.get("averages", {}).items() if self.ema is not None else ():
            self.averages[name] = value.detach().to(self.averages[name], copy=True)

    def _finish(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], passes: Passes
    ) -> None:
        """Writes the new state, if the semantics let these values through."""
        if self.semantics.on_nonfinite == "ignore" or bool(passes.finite):
            trained = {name for names in self.group_names() for name in names}
            for name in trained:
                parameters[name].grad = passes.gradients.get(name)
            self.optimizer.base_optimizer.step()
            self.optimizer._opt_called = True
            for name in trained:
                parameters[name].grad = None
            for name, own in passes.memory.items():
                self.optimizer.memory[parameters[name]] = dict(own)
            for name, value in buffers.items():
                value.copy_(passes.buffers[name])
            if self.ema is not None:
                self.averages = self.ema.after(self.averages, {**parameters, **buffers})
        elif self.semantics.on_nonfinite == "raise":
            raise StepConfigError(
                f"The step is not finite (loss {float(passes.loss):g}, perturbed loss "
                f"{float(passes.perturbed_loss):g}, gradient norm "
                f"{float(passes.grad_norm):g}); nothing was changed."
            )


def _signed(seed: int) -> int:
    """The 64 bits of a seed as a signed number."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise StepConfigError(f"seed={seed!r}: expected an integer of at most 64 bits.")
    return seed - 2**64 if seed >= 2**63 else seed
