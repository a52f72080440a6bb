"""What a loss must be, for a step to differentiate it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sam_export.errors import StepConfigError


def check_loss(loss: Any, from_model: bool) -> None:
    """A floating-point scalar that depends on a trained parameter.

    Args:
        loss: What came out.
        from_model: Whether the model returned it itself.

    Raises:
        StepConfigError: It is something else.
    """
    source = "The model (loss_fn is None)" if from_model else "loss_fn"
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        found = (
            f"{loss.dtype} of shape {list(loss.shape)}"
            if isinstance(loss, Tensor)
            else f"a {type(loss).__name__}"
        )
        raise StepConfigError(
            f"{source} returned {found}; a step needs one floating-point scalar. Reduce the loss "
            "(reduction='mean'), or return only the loss."
        )
    if not loss.requires_grad:
        raise StepConfigError(
            f"{source} returned a value that depends on no trained parameter; there is nothing to "
            "differentiate. Is the output detached, or the model under torch.no_grad()?"
        )


def refuse_reentrant(loss: Tensor) -> None:
    """Looks through the autograd graph of a loss for reentrant checkpoints.

    A step asks for the gradients of its parameters alone; the reentrant form of
    `torch.utils.checkpoint` hides parameters from that, which would then count as unused.

    Raises:
        StepConfigError: There is one.
    """
    seen = {loss.grad_fn}
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise StepConfigError(
                "The model uses torch.utils.checkpoint with use_reentrant=True, which gives no "
                "gradients to torch.autograd.grad. Give use_reentrant=False."
            )
        following = {function for function, _ in node.next_functions} - seen
        seen |= following
        pending.extend(following)
