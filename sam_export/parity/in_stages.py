"""A session that takes each step in its three stages, to be compared like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from sam_export.artifact.result import StepResult
from sam_export.errors import SessionError
from sam_export.runtime.session import Session


class InStages:
    """Steps of a session as ``ascent``, ``descent`` and ``update``, with nothing in between.

    For `check_parity`, which then proves the stages equal to eager PyTorch::

        report = sx.check_parity(step, batches, sessions={"onnx": sx.InStages(session)})

    Args:
        session: Of a step that was captured with ``staged=True``.

    Raises:
        SessionError: It has no stages, or not each of its steps has all three (periodic SAM).
    """

    def __init__(self, session: Session) -> None:
        if not session.contract.carried or session.contract.every > 1:
            found = f"every={session.contract.every}" if session.contract.carried else "no stages"
            raise SessionError(
                "InStages takes each step as ascent, descent and update; this session has "
                f"{found}. Capture with staged=True and SAM(every=1)."
            )
        self.session = session
        self.contract = session.contract
        self.provider = session.provider
        self.known_rounding = session.known_rounding

    @property
    def facts(self) -> dict[str, Any]:
        """What the numbers may depend on; see `Session.facts`."""
        return self.session.facts

    @property
    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of all state, by name."""
        return self.session.state

    def set_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Makes ``state`` the current one; see `Session.set_state`."""
        self.session.set_state(state)

    def step(self, *batch: Any, **hyper: Any) -> StepResult:
        """One step; see `Session.step`."""
        ascent = self.session.ascent(*batch)
        descent = self.session.descent(
            *batch, gradients=ascent.gradients, buffers=ascent.buffers, **hyper
        )
        update = self.session.update(
            descent.gradients, buffers=descent.buffers, ascended=ascent.gradients
        )
        return StepResult(
            loss=ascent.loss,
            perturbed_loss=descent.perturbed_loss,
            grad_norm=descent.grad_norm,
            perturbation_norm=descent.perturbation_norm,
            finite=update.finite,
            outputs=ascent.outputs,
            perturbed_grad_norm=update.perturbed_grad_norm,
            loss_scale=update.loss_scale,
        )
