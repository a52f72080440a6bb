"""What a captured graph must satisfy, whatever made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from sam_export._compat.origins import stage_of
from sam_export.artifact.contract import StepContract, TensorSpec
from sam_export.artifact.semantics import Semantics
from sam_export.errors import CaptureError


def refuse_mutation(graph: fx.Graph) -> None:
    """Every operator leaves its inputs alone.

    Raises:
        CaptureError: An operator's schema says that it writes to an argument, or it is
            ``native_batch_norm`` in training, which does so without saying.
    """
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        silent = node.target is torch.ops.aten.native_batch_norm.default and bool(node.args[5])
        if node.target._schema.is_mutable or silent:
            raise CaptureError(
                f"Operator {node.target} ({node.name}) changes its input in place, which a "
                f"functional graph may not hold.\n{node.meta.get('stack_trace') or ''}"
            )


def refuse_wrong_flow(
    graph: fx.Graph,
    inputs: Sequence[str],
    outputs: Sequence[str],
    contract: StepContract,
    semantics: Semantics,
) -> None:
    """The graph holds two passes: what depends on what is as one SAM step has it.

    The loss comes before the perturbation, so it depends on no hyper-parameter; the perturbed loss
    depends on ``rho``; each new trained parameter depends on ``lr`` or on a slot of its own (ASGD
    keeps its step size in one, Rprop knows no other), and on ``rho`` and the batch if its gradient
    depends on the parameters at all. (Behind a rounding it is zero, in a linear loss it is the same
    everywhere.)

    Raises:
        CaptureError: Naming the first output for which that does not hold.
    """
    placeholders = graph.find_nodes(op="placeholder")
    position = {node: index for index, node in enumerate(placeholders)}
    (result,) = graph.find_nodes(op="output")
    trained = [s.name for s in contract.state if s.role == "parameter" and s.trainable]
    every = sum(1 << inputs.index(name) for name in trained)
    first_pass = 1 << len(inputs)  # of what the first pass computes from the parameters
    reached: dict[fx.Node, int] = {}
    for node in graph.nodes:
        mask = 1 << position[node] if node in position else 0
        for source in node.all_input_nodes:
            mask |= reached[source]
        if mask & every and stage_of(node) == "ascent":
            mask |= first_pass
        reached[node] = mask
    bit = {name: 1 << index for index, name in enumerate(inputs)}
    batch = sum(bit[spec.name] for spec in contract.batch)
    depends: Mapping[str, int] = {
        name: reached[node] for name, node in zip(outputs, result.args[0], strict=True)
    }

    def need(name: str, sources: int, what: str) -> None:
        if not depends[name] & sources:
            raise CaptureError(f"Output {name!r} of the captured step does not depend on {what}.")

    # Where a batch's parts have perturbations of their own, each part begins after the second pass
    # of the last one: it waits for its gradients, and may begin with the statistics that it left.
    follows = semantics.perturbs_each_part
    if depends["loss"] & bit["hyper.lr"] or (depends["loss"] & bit["hyper.rho"] and not follows):
        raise CaptureError("The loss of the captured step depends on a hyper-parameter.")
    need("loss", batch, "the batch")
    need("perturbed_loss", bit["hyper.rho"], "rho")
    for name in trained:
        new = f"next.{name}"
        own = sum(bit[s.name] for s in contract.state if s.role == "slot" and s.parameter == name)
        need(new, bit["hyper.lr"] | own, "lr: the base update is missing")
        if depends[new] & (first_pass | bit["hyper.rho"]):
            need(new, bit["hyper.rho"], "rho: the second pass is missing")
            need(new, batch, "the batch")


def refuse_other_state(
    specs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], feeds: Mapping[str, str]
) -> None:
    """New state has the dtype and the shape of the old.

    Raises:
        CaptureError: It has others.
    """
    state = {spec.name: spec for spec in specs}
    for spec in outputs:
        if spec.name in feeds:
            before = state[feeds[spec.name]]
            if (before.dtype, before.shape) != (spec.dtype, spec.shape):
                raise CaptureError(
                    f"One step turns state {before.name!r} from {before.description} into "
                    f"{spec.description}; the next step could not take it."
                )
