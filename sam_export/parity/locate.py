"""`locate`: where a target's step starts to differ, and whose fault it is."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from sam_export._compat.origins import line_of, origin_of
from sam_export.artifact.folder import Artifact, open_artifact
from sam_export.errors import ParityError
from sam_export.parity.blame import Blame, blame
from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate_compiled import CompiledSearch
from sam_export.parity.locate_judge import Gap, gaps
from sam_export.parity.locate_onnx import OnnxForm
from sam_export.parity.locate_search import Form, Piece, Search
from sam_export.parity.locate_torch import TorchForm
from sam_export.parity.reproduction import write_reproduction
from sam_export.parity.tolerances import Tolerances
from sam_export.step.train_step import TrainStep
from sam_export.tracing.captured_step import CapturedStep
from sam_export.tracing.dynamic import Dynamic

ONNX_TARGETS = ("onnx", "onnx-training")
TORCH_TARGETS = ("torch-compile", "torchscript", "aot-inductor")


@dataclass(frozen=True)
class Location:
    """The first node of a step's graph whose output differs from eager's.

    Attributes:
        target: Where it differs.
        verdict: ``node`` (found); ``together`` (a piece that differs as a whole, though both of its
            halves agree: a fusion, or rounding that adds up); ``outside`` (the session differs and
            no piece of the graph does); ``equal`` (nothing differs).
        differing: Outputs of the step that differ in the session, worst first.
        node: The node of the captured graph; of a piece, the one whose value is worst.
        op: Its operator (``aten::gelu_backward``).
        stage: ``ascent``, ``descent`` or ``update``.
        module: Path of the module that it comes from.
        line: The user's source line.
        span: The nodes of the piece: one where the verdict is ``node``. No node before that one
            differs by itself; where pieces are compiled, nodes before it that differ only fused
            with each other are looked for once this one is mended.
        gap: How far the node's value is off.
        onnx_nodes: The ONNX nodes of the piece.
        fault: Whose fault it is.
        harmless: Values that differ and are read so that nothing after them does.
        pieces: How many pieces of the graph were run; equal nodes that are compiled once are one.
        nodes: How many nodes the captured graph has.
        seconds: How long it took.
        judge: ``float64``, or ``eager`` where the graph does not run in float64.
        reproduction: Folder that was written.
    """

    target: str
    verdict: str
    differing: tuple[str, ...] = ()
    node: str = ""
    op: str = ""
    stage: str = ""
    module: str = ""
    line: str = ""
    span: tuple[str, ...] = ()
    gap: Gap | None = None
    onnx_nodes: tuple[str, ...] = ()
    fault: Blame = field(default_factory=lambda: Blame(""))
    harmless: tuple[str, ...] = ()
    pieces: int = 0
    nodes: int = 0
    seconds: float = 0.0
    judge: str = "float64"
    reproduction: str | None = None

    @property
    def found(self) -> bool:
        """Whether there is a piece of the graph that differs."""
        return self.verdict in ("node", "together")

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the fields, with null for numbers that are not finite."""

        def plain(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {str(key): plain(item) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        values = asdict(self)
        if self.gap is not None:
            values["gap"]["relative"] = self.gap.relative
        result = plain(values)
        assert isinstance(result, dict)
        return result

    def __str__(self) -> str:
        cost = f"{self.pieces} pieces of {self.nodes} nodes, {self.seconds:.1f} s"
        if self.verdict == "equal":
            return f"{self.target}: nothing differs in this step"
        outputs = ", ".join(self.differing[:4]) + (", …" if len(self.differing) > 4 else "")
        if self.verdict == "outside":
            return (
                f"{self.target}: {outputs} differ, but no piece of the graph does ({cost}). "
                "Look around it: state written in place, random numbers, the session."
            )
        assert self.gap is not None
        gap = self.gap
        where = f"{self.stage}{f', module {self.module}' if self.module else ''}"
        alone = self.verdict == "node"
        lines = [
            f"{self.target}: the first that differs is {self.node} ({self.op}), in {where}",
            f"  line: {self.line or 'none of the user: made by the optimizer or by sam_export'}",
            f"  error {gap.error:.3g} of {gap.size:.3g} (relative {gap.relative:.3g}); allowed "
            f"{gap.bound:.3g}; judged by {self.judge}",
            f"  worst element {list(gap.index)}: found {gap.found!r}, expected {gap.expected!r}",
        ]
        if not alone:
            lines.append(
                f"  only together: {len(self.span)} nodes from {self.span[0]} to {self.span[-1]} "
                "differ as one piece; both of its halves agree"
            )
        if self.onnx_nodes:
            more = ", …" if len(self.onnx_nodes) > 6 else ""
            lines.append(f"  ONNX nodes: {', '.join(self.onnx_nodes[:6])}{more}")
        lines.append(f"  fault: {self.fault.fault}")
        ways = (
            f"{way} {'agrees' if says is True else 'differs' if says is False else says}"
            for way, says in self.fault.ways.items()
        )
        lines.append(f"    {'; '.join(ways)}")
        if outputs:
            lines.append(f"  outputs that differ: {outputs}")
        lines.append(f"  {cost}")
        if self.reproduction:
            lines.append(f"  reproduction: python {self.reproduction}/reproduce.py")
        return "\n".join(lines)


def locate(
    step: TrainStep | CapturedStep,
    target: str,
    batch: Any,
    state: Mapping[str, NDArray[Any]] | None = None,
    artifact: Artifact | str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    hyper: Mapping[str, Sequence[float]] | None = None,
    dynamic: Dynamic = "batch",
    backends: Sequence[str] | None = None,
    tolerances: Tolerances | None = None,
) -> Location:
    """Finds the first node of the step's graph whose output differs from eager PyTorch's.

    All of it happens on the CPU. The session is run on one step. If an output differs, pieces of
    the graph are: each gets eager's values of what comes before it and is compared with the same
    nodes in float64, so no error of an earlier node is seen twice. See `locate_search`, and
    `locate_compiled` for targets whose pieces have to be compiled.

    Args:
        step: The step, or what `capture` made of it.
        target: ``onnx``, ``onnx-training``, ``torch-compile``, ``torchscript``, ``aot-inductor``.
        batch: One on which the target differs.
        state: Start state, as ``session.state`` has it; None: the captured one.
        artifact: What differs, made for the CPU; None: the step is exported afresh.
        out: Folder to write a reproduction to; it must not exist. None: none is written.
        hyper: Hyper-parameters, one value per group; those omitted are the captured ones.
        dynamic: As `capture` takes it, where ``step`` is not captured yet.
        backends: For ``torch-compile``: its backends to blame, the one in use last. Where they are
            given, the session is not run: it has Inductor.
        tolerances: Other numbers than the defaults.

    Raises:
        ParityError: The target has no pieces (``ort-artifacts``), the step draws from torch's own
            generator, the artifact is of another step, target or device, or ``out`` exists.
        SamExportError: Capture or export fails.
    """
    begun = time.perf_counter()
    tol = tolerances or Tolerances()
    _check(target, out)
    captured = captured_of(step, batch, dynamic)
    graph = StepGraph(captured, batch, state, hyper)
    judge = "float64" if graph.judges_in_double else "eager"
    with ExitStack() as stack:
        differing: tuple[str, ...] = ()
        opened = None
        if backends is None:
            opened = _artifact(artifact, captured, target, stack)
            differing = _differing(graph, opened, batch, hyper, tol)
            if not differing:
                seconds = time.perf_counter() - begun
                return Location(
                    target, "equal", nodes=len(graph.nodes), seconds=seconds, judge=judge
                )
        form: Form
        if target in ONNX_TARGETS:
            assert opened is not None
            form = OnnxForm(graph, opened.file("step"), target)
        else:
            form = TorchForm(graph, target, backends)
        search = _search(graph, form, tol, backends is None, differing)
        piece = search.find()
        verdict = "outside" if backends is None else "equal"
        location = Location(
            target,
            verdict if piece is None else "node" if len(piece.span) == 1 else "together",
            differing=differing,
            harmless=tuple(search.harmless),
            pieces=search.runs,
            nodes=len(graph.nodes),
            judge=judge,
        )
        if piece is not None:
            location = _described(location, graph, form, piece, tol)
            if out is not None:
                about = str(location)
                folder = write_reproduction(out, graph, form, piece, about, tol)
                location = replace(location, reproduction=str(folder))
    return replace(location, seconds=time.perf_counter() - begun)


def _search(
    graph: StepGraph, form: Form, tol: Tolerances, differs: bool, outputs: Sequence[str]
) -> Search:
    if isinstance(form, TorchForm) and form.compiles:
        nodes = [graph.results[output] for output in outputs]
        return CompiledSearch(graph, form, tol, whole_first=not differs, differing=nodes)
    return Search(graph, form, tol, whole_first=isinstance(form, OnnxForm))


def _check(target: str, out: str | os.PathLike[str] | None) -> None:
    if target not in (*ONNX_TARGETS, *TORCH_TARGETS):
        raise ParityError(
            f"A difference cannot be looked for in target {target!r}; it can in "
            f"{', '.join((*ONNX_TARGETS, *TORCH_TARGETS))}."
        )
    if out is not None and os.path.lexists(out):
        raise ParityError(f"{out} is there already; give a folder that is yet to be made.")


def captured_of(step: TrainStep | CapturedStep, batch: Any, dynamic: Dynamic) -> CapturedStep:
    """``step`` captured with ``batch``, unless it is already."""
    if isinstance(step, CapturedStep):
        return step
    from sam_export.parity.check import _example
    from sam_export.tracing.capture import capture

    return capture(step, _example(step, batch), dynamic=dynamic)


def _artifact(
    given: Artifact | str | os.PathLike[str] | None,
    captured: CapturedStep,
    target: str,
    stack: ExitStack,
) -> Artifact:
    if given is None:
        from sam_export.api import export

        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sam_export-locate-"))
        return export(captured, Path(folder) / "step", target=target)
    artifact = given if isinstance(given, Artifact) else open_artifact(given)
    if artifact.target != target:
        raise ParityError(f"{artifact.path} is of target {artifact.target!r}, not {target!r}.")
    made_for = str(artifact.details.get("device", "cpu"))
    if made_for != "cpu":
        raise ParityError(
            f"{artifact.path} is made for {made_for!r}, and a difference is looked for on the CPU, "
            "whose kernels are others. Leave the artifact out: the step is then exported for the "
            "CPU, which shows a fault of the graph or of its lowering."
        )
    if artifact.contract.program("step") != captured.contract.program("step"):
        raise ParityError(
            f"{artifact.path} is not this step: the inputs or outputs of its graph are others. "
            "Give the recipe that it was exported from."
        )
    return artifact


def _differing(
    graph: StepGraph,
    artifact: Artifact,
    batch: Any,
    hyper: Mapping[str, Sequence[float]] | None,
    tol: Tolerances,
) -> tuple[str, ...]:
    """The outputs of the session's step that differ, worst first."""
    from sam_export.runtime.engines import open_session

    session = open_session(artifact, "cpu", torch.get_num_threads())
    session.set_state(graph.start)
    arguments = (batch,) if isinstance(batch, Mapping) else tuple(batch)
    result = session.step(*arguments, **{name: list(v) for name, v in (hyper or {}).items()})
    after = session.state
    found: dict[str, NDArray[Any]] = {}
    names: dict[str, str] = {}
    for output, node in graph.results.items():
        names.setdefault(node, output)
        state = graph.spec.feeds.get(output)
        if state is not None:
            if graph.is_finite:
                found[node] = after[state].reshape(tuple(graph.values[node].shape))
        elif hasattr(result, output):
            found[node] = getattr(result, output).numpy().reshape(tuple(graph.values[node].shape))
    given = {name: graph.values[name] for name in graph.sources if name in graph.values}
    over = [gap for gap in gaps(graph, given, found, tol) if gap.is_over]
    over.sort(key=lambda gap: -(gap.error / gap.bound if gap.bound else math.inf))
    return tuple(names[gap.name] for gap in over)


def _described(
    location: Location, graph: StepGraph, form: Form, piece: Piece, tol: Tolerances
) -> Location:
    gap = piece.gaps[0]
    node = graph.nodes[gap.name]
    origin = origin_of(node)
    stage, _, module = origin.partition("/")
    onnx_nodes: tuple[str, ...] = ()
    if isinstance(form, OnnxForm):
        model, _ = form.piece(piece.wanted, piece.given)
        onnx_nodes = tuple(item.name for item in model.graph.node)
    operator: Any = node
    while str(operator.target) == "<built-in function getitem>":
        operator = operator.args[0]
    return replace(
        location,
        node=node.name,
        op=str(operator.target).replace("aten.", "aten::").removesuffix(".default"),
        stage=stage,
        module=module,
        line=line_of(node),
        span=piece.span,
        gap=gap,
        onnx_nodes=onnx_nodes,
        fault=blame(graph, form, piece, tol),
    )
