"""A captured step run node by node in eager PyTorch, in its own dtype or in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from sam_export.artifact.contract import ProgramSpec, discarded_if_not_finite
from sam_export.errors import ParityError
from sam_export.runtime.batches import checked_batch
from sam_export.tracing.captured_step import CapturedStep
from sam_export.tracing.randomness import drawn_nodes

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


class StepGraph:
    """The program ``step`` of a captured step with the eager value of each of its nodes.

    Args:
        captured: The step.
        batch: A batch as the step takes it.
        state: Start state by name; None: the captured one.
        hyper: Hyper-parameters, one value per group; those omitted are the captured ones.

    Raises:
        ParityError: The step draws from torch's generator, or a state tensor is missing.
        SessionError: The batch does not fit the contract.

    Attributes:
        spec: The program's inputs and outputs.
        start: The start state by name.
        nodes: The nodes of the graph by name, in order.
        sources: Names of the nodes that are given: inputs, constants, and draws from Philox.
        values: Name of every node with a tensor value to that value, in the model's own dtype.
        results: Contract's name of each output to the name of its node.
        inputs: Contract's name of each input to the name of its node.
        judges_in_double: Whether float64 judges; False where the graph does not run in float64.
    """

    def __init__(
        self,
        captured: CapturedStep,
        batch: Any,
        state: Mapping[str, NDArray[Any]] | None = None,
        hyper: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        if captured.random_ops:
            raise ParityError(
                "The step draws from torch's own generator, so no two runs of a node can be "
                'compared. Capture with Semantics(generator="philox") to find a difference.'
            )
        contract = captured.contract
        self.captured = captured
        given_state = state or captured.state
        self.spec: ProgramSpec = contract.program("step")
        self.program = captured.programs["step"]
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.program.graph.nodes}
        self.place = {name: place for place, name in enumerate(self.nodes)}
        self.start: dict[str, NDArray[Any]] = {
            item.name: np.array(given_state[item.name], dtype=item.dtype)
            for item in contract.state
            if item.name in given_state
        }
        given = _given(captured, self.spec, batch, given_state, hyper or {})
        known = leaves(self.program, list(given.values()))
        drawn = [node.name for node in drawn_nodes(self.program.graph)]
        self.sources = frozenset((*known, *drawn))
        users = self.program.graph_signature.user_inputs
        self.inputs = {n: str(u) for n, u in zip(given, users, strict=True)}
        (end,) = self.program.graph.find_nodes(op="output")
        self.results = {o.name: v.name for o, v in zip(self.spec.outputs, end.args[0], strict=True)}
        everything = run_nodes(self.nodes.values(), known, False)
        self.values: dict[str, Tensor] = {
            name: value for name, value in everything.items() if isinstance(value, Tensor)
        }
        self.judges_in_double = True
        try:
            run_nodes(self.nodes.values(), known, True)
        except Exception:
            self.judges_in_double = False
        finite = self.results.get("finite")
        self.is_finite = finite is None or bool(self.values[finite])

    @property
    def inputs_by_node(self) -> dict[str, str]:
        """Node of each input to its name in the contract."""
        return {node: name for name, node in self.inputs.items()}

    def next_state(self) -> dict[str, NDArray[Any]]:
        """Eager's state after the step, by the contract's names; as before if it is not finite."""
        semantics = self.captured.semantics
        kept = () if self.is_finite else discarded_if_not_finite(self.spec, semantics)
        state = dict(self.start)
        for output, node in self.results.items():
            if output in self.spec.feeds and output not in kept:
                state[self.spec.feeds[output]] = np.array(self.values[node].numpy())
        return state

    def start_of(self, name: str) -> Tensor | None:
        """The old value of the state tensor whose new value a node is; None for other nodes."""
        for output, node in self.results.items():
            if node == name and output in self.spec.feeds:
                return self.values[self.inputs[self.spec.feeds[output]]]
        return None

    def evaluate(
        self, wanted: Iterable[str], given: Mapping[str, Tensor], double: bool = False
    ) -> dict[str, Tensor]:
        """Values of the nodes ``wanted``, computed from those of ``given`` (all sources in it)."""
        nodes, ends = self.between(wanted, given)
        results = run_nodes(nodes, {name: given[name] for name in ends}, double)
        return {name: results[name] for name in wanted}

    def between(
        self, wanted: Iterable[str], given: Mapping[str, Any]
    ) -> tuple[list[fx.Node], list[str]]:
        """The nodes that compute ``wanted`` from ``given``, and which of ``given`` they read.

        Both in the order of the graph. A node that is both wanted and given is given.
        """
        seen: set[str] = set()
        ends: set[str] = set()
        pending = [self.nodes[name] for name in wanted]
        while pending:
            node = pending.pop()
            if node.name in given:
                ends.add(node.name)
            elif node.name not in seen:
                seen.add(node.name)
                pending.extend(node.all_input_nodes)
        order = self.place.__getitem__
        return [self.nodes[n] for n in sorted(seen, key=order)], sorted(ends, key=order)

    def users(self, name: str) -> list[str]:
        """Names of the nodes that read a node."""
        return [node.name for node in self.nodes[name].users if node.op != "output"]


def leaves(program: torch.export.ExportedProgram, inputs: Sequence[Any]) -> dict[str, Any]:
    """Placeholder to value: the program's own constants, and ``inputs`` in order."""
    held = {**program.state_dict, **program.constants}
    given = iter(inputs)
    values: dict[str, Any] = {}
    for item in program.graph_signature.input_specs:
        name = str(getattr(item.arg, "name", ""))
        values[name] = held[item.target] if item.target is not None else next(given)
    return values


def run_nodes(nodes: Iterable[fx.Node], known: Mapping[str, Any], double: bool) -> dict[str, Any]:
    """Runs ATen nodes eagerly.

    Args:
        nodes: In order.
        known: Values of nodes that are not run, by name.
        double: Whether every floating value is float64, wherever the graph names a dtype, too.

    Returns:
        The value of every node that was run or known, by name.
    """
    values = {name: _double(value) if double else value for name, value in known.items()}

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return values[value.name]
        return torch.float64 if double and value in _NARROW else value

    def is_dtype_or_node(value: Any) -> Any:
        return argument(value) if isinstance(value, (fx.Node, torch.dtype)) else value

    before = torch.get_default_dtype()
    if double:
        torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            for node in nodes:
                if node.name in values or node.op == "output":
                    continue
                if node.op != "call_function":
                    raise ParityError(f"The graph holds {node.format_node()}, which has no value.")
                args = map_aggregate(node.args, is_dtype_or_node)
                kwargs = map_aggregate(node.kwargs, is_dtype_or_node)
                values[node.name] = node.target(*args, **kwargs)  # type: ignore
    finally:
        torch.set_default_dtype(before)
    return values


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _given(
    captured: CapturedStep,
    spec: ProgramSpec,
    batch: Any,
    state: Mapping[str, NDArray[Any]],
    hyper: Mapping[str, Sequence[float]],
) -> dict[str, Tensor]:
    contract = captured.contract
    missing = [item.name for item in contract.state if item.name not in state]
    if missing:
        raise ParityError(
            f"The state to start from lacks {', '.join(missing[:5])}; give every tensor of "
            "session.state."
        )
    values: dict[str, Any] = {
        item.name: np.asarray(state[item.name], dtype=item.dtype) for item in contract.state
    }
    for item in contract.hyper:
        values[f"hyper.{item.name}"] = np.array(hyper.get(item.name, item.defaults), np.float64)
    fed = {item.name for item in contract.batch}
    arguments = (batch,) if isinstance(batch, Mapping) else tuple(batch)
    tensors = checked_batch(arguments, contract, spec)
    values |= zip([name for name in spec.inputs if name in fed], tensors, strict=True)
    return {name: _tensor(values[name]) for name in spec.inputs}


def _tensor(value: Any) -> Tensor:
    whole = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
    return whole.detach().cpu().contiguous()
