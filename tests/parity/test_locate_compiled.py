"""The search through compiled pieces, over backends of Dynamo with faults put in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sam_export as sx
from sam_export.parity import locate_compiled
from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate import Location, locate
from sam_export.parity.locate_compiled import CompiledSearch
from sam_export.parity.locate_screen import AllBut, Screen, joined
from sam_export.parity.locate_torch import TorchForm
from sam_export.parity.tolerances import Tolerances

aten = torch.ops.aten
Pick = Callable[[fx.Graph], list[fx.Node]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(x).tanh()
        return out


class Deep(nn.Module):
    """Equal blocks between two layers that are like nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(8)))
        self.wide = nn.Linear(6, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(nn.functional.gelu(self.wide(self.blocks(x))))
        return logits


def made() -> tuple[sx.CapturedStep, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Deep()
    optimizer = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
    batch = (torch.randn(7, 6), torch.randint(0, 3, (7,)))
    return sx.capture(sx.TrainStep(model, nn.CrossEntropyLoss(), optimizer), batch), batch


@pytest.fixture(scope="module")
def deep() -> tuple[sx.CapturedStep, tuple[Tensor, Tensor]]:
    return made()


class Wrong:
    """A backend of Dynamo that takes what ``pick`` finds in a graph 1.5 times, and then runs it.

    Attributes:
        sizes: How many operators each graph had that it was given.
    """

    name = "wrong_for_a_test"

    def __init__(
        self, pick: Pick, then: Callable[[fx.GraphModule, Any], Any] | None = None
    ) -> None:
        self.pick, self.then = pick, then
        self.sizes: list[int] = []

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Any:
        self.sizes.append(len(calls(module.graph)))
        for item in self.pick(module.graph):
            with module.graph.inserting_after(item):
                wrong = module.graph.call_function(aten.mul.Tensor, (item, 1.5))
            item.replace_all_uses_with(wrong, delete_user_cb=lambda user, w=wrong: user is not w)
        module.recompile()
        return module.forward if self.then is None else self.then(module, inputs)


def calls(graph: fx.Graph, target: Any = None) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and target in (None, n.target)]


def of(target: Any) -> Pick:
    return lambda graph: calls(graph, target)


def reads(target: Any, other: Any) -> Pick:
    """Nodes of an operator whose first argument is computed by another one in the same graph."""

    def pick(graph: fx.Graph) -> list[fx.Node]:
        return [n for n in calls(graph, target) if getattr(n.args[0], "target", None) is other]

    return pick


_current: list[Wrong] = []


def _wrong(module: fx.GraphModule, inputs: Any) -> Any:
    return _current[-1](module, inputs)


@pytest.fixture(scope="module")
def _backend() -> None:
    torch._dynamo.register_backend(_wrong, Wrong.name)  # there is no way to take it back


@pytest.fixture
def registered(_backend: None) -> Iterator[Callable[[Wrong], Wrong]]:
    def register(backend: Wrong) -> Wrong:
        _current.append(backend)
        return backend

    yield register
    _current.clear()


Register = Callable[[Wrong], Wrong]
Deeply = tuple[sx.CapturedStep, tuple[Tensor, Tensor]]


def located(deep: Deeply, **kwargs: Any) -> Location:
    captured, batch = deep
    return locate(captured, "torch-compile", batch, backends=("eager", Wrong.name), **kwargs)


def test_nothing_differs(deep: Deeply, registered: Register) -> None:
    backend = registered(Wrong(lambda graph: []))
    location = located(deep)
    assert location.verdict == "equal"
    # The whole was run, and is the judge of that.
    whole = len(calls(deep[0].programs["step"].graph))
    assert max(backend.sizes) > 0.9 * whole


@pytest.mark.parametrize(
    ("target", "stage", "module"),
    [
        (aten.tanh.default, "ascent", "blocks.0"),
        (aten.gelu.default, "ascent", ""),
        (aten.gelu_backward.default, "ascent", ""),
    ],
)
def test_a_wrong_operator_is_found_at_the_cost_of_a_part_of_the_graph(
    deep: Deeply, registered: Register, target: Any, stage: str, module: str
) -> None:
    backend = registered(Wrong(of(target)))
    location = located(deep)
    assert location.verdict == "node"
    first = next(n for n in deep[0].programs["step"].graph.nodes if n.target is target)
    assert (location.node, location.stage, location.module) == (first.name, stage, module)
    assert location.fault.ways == {"eager": True, Wrong.name: False}
    assert location.gap is not None
    assert location.gap.relative == pytest.approx(0.5, rel=1e-3)
    whole = len(calls(deep[0].programs["step"].graph))
    assert max(backend.sizes) < whole / 2  # eight blocks are compiled as one


def test_an_operator_that_is_wrong_in_the_update_is_found(
    deep: Deeply, registered: Register
) -> None:
    """``w - lr · m`` of one weight alone: among the last nodes of the graph."""

    def pick(graph: fx.Graph) -> list[fx.Node]:
        subtractions = [n for t in (aten.add.Tensor, aten.sub.Tensor) for n in calls(graph, t)]
        return [n for n in subtractions if shape(n) == (10, 6)]

    registered(Wrong(pick))
    location = located(deep)
    assert location.verdict == "node"
    assert location.gap is not None
    graph = deep[0].programs["step"].graph
    right = [n.name for n in graph.nodes if n.target in (aten.add.Tensor, aten.sub.Tensor)]
    right = [name for name in right if tuple(named(graph, name).meta["val"].shape) == (10, 6)]
    assert location.node == right[0]


def shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("example_value", node.meta.get("val"))
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def named(graph: fx.Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == name)


def test_two_neighbours_that_are_wrong_only_if_fused_are_found_together(
    deep: Deeply, registered: Register
) -> None:
    registered(Wrong(reads(aten.gelu.default, aten.addmm.default)))
    location = located(deep)
    graph = deep[0].programs["step"].graph
    gelu = calls(graph, aten.gelu.default)[0]
    assert location.verdict == "together"
    assert location.span[-1] == gelu.name
    assert location.span[0] == gelu.args[0].name  # type: ignore[union-attr]
    assert location.fault.ways == {"eager": True, Wrong.name: False}


@pytest.mark.parametrize("window", [6, 8, 10])
def test_neighbours_on_both_sides_of_a_windows_border_are_found(
    deep: Deeply, registered: Register, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """However the graph is cut, the windows over the borders have both."""
    monkeypatch.setattr(locate_compiled, "_WINDOW", window)
    registered(Wrong(reads(aten.gelu.default, aten.addmm.default)))
    location = located(deep)
    gelu = calls(deep[0].programs["step"].graph, aten.gelu.default)[0]
    assert location.verdict == "together"
    assert location.span == (gelu.args[0].name, gelu.name)  # type: ignore[union-attr]


def test_what_differs_among_strangers_only_is_no_fault(deep: Deeply, registered: Register) -> None:
    """The graph that holds one node of each kind is none of the step's."""

    def pick(graph: fx.Graph) -> list[fx.Node]:
        joint = any("part1_" in n.name for n in graph.find_nodes(op="placeholder"))
        return calls(graph, aten.gelu.default) if joint else []

    backend = registered(Wrong(pick))
    captured, batch = deep
    graph = StepGraph(captured, batch)
    form = TorchForm(graph, "torch-compile", ("eager", Wrong.name))
    gelu = calls(captured.programs["step"].graph, aten.gelu.default)[0].name
    values = [name for name in graph.values if name not in graph.sources]
    assert gelu in Screen(graph, form, Tolerances()).differing(values)
    assert backend.sizes
    assert located(deep).verdict == "equal"


def test_what_differs_without_its_neighbours_only_is_no_fault(
    deep: Deeply, registered: Register
) -> None:
    """An operator that is wrong by itself and in the joint graph, but not where it stands."""

    def pick(graph: fx.Graph) -> list[fx.Node]:
        wrong = set(reads(aten.gelu.default, aten.addmm.default)(graph))
        return [n for n in calls(graph, aten.gelu.default) if n not in wrong]

    registered(Wrong(pick))
    assert located(deep).verdict == "equal"


def test_a_node_counts_only_if_outputs_that_differ_are_computed_from_it(
    deep: Deeply, registered: Register
) -> None:
    """Where the loss differs, an error in the second pass is not the answer."""
    registered(Wrong(of(aten.gelu_backward.default)))
    captured, batch = deep
    graph = StepGraph(captured, batch)
    form = TorchForm(graph, "torch-compile", ("eager", Wrong.name))

    def search(*outputs: str) -> CompiledSearch:
        nodes = [graph.results[output] for output in outputs]
        return CompiledSearch(graph, form, Tolerances(), whole_first=False, differing=nodes)

    piece = search("perturbed_loss").find()
    assert piece is not None
    assert piece.span == ("gelu_backward",)
    found = search("loss")
    assert found._alone() is None
    assert found._suspects
    assert found._suspects[0] == "gelu_backward"


def test_what_a_node_does_not_explain_is_looked_for_before_it(
    deep: Deeply, registered: Register
) -> None:
    """A fusion that is wrong before a node that is: found first, where the loss differs, too."""

    def pick(graph: fx.Graph) -> list[fx.Node]:
        fused = reads(aten.gelu.default, aten.addmm.default)(graph)
        return [*fused, *calls(graph, aten.gelu_backward.default)]

    registered(Wrong(pick))
    captured, batch = deep
    graph = StepGraph(captured, batch)
    form = TorchForm(graph, "torch-compile", ("eager", Wrong.name))
    nodes = [graph.results[output] for output in ("loss", "perturbed_loss")]
    search = CompiledSearch(graph, form, Tolerances(), whole_first=False, differing=nodes)
    piece = search.find()
    assert piece is not None
    assert piece.span[-1] == "gelu"
    assert len(piece.span) > 1


def test_pieces_side_by_side_compute_what_each_does(deep: Deeply) -> None:
    captured, batch = deep
    graph = StepGraph(captured, batch)
    form = TorchForm(graph, "torch-compile")
    names = ["gelu", "tanh", "tanh_1"]
    pieces = [form.piece([name], AllBut(graph.values, [name])) for name in names]
    joint = joined(pieces)
    assert len(joint.inputs) == sum(len(piece.inputs) for piece in pieces) == len(joint.symbolic)
    results = joint.module(*joint.inputs.values())
    for name, result in zip(names, results, strict=True):
        assert torch.equal(result, graph.values[name])


@pytest.mark.wide
def test_a_node_of_three_thousand_is_found_through_inductor_within_two_minutes(
    registered: Register,
) -> None:
    """The time is the processor's, of all its cores: those of this machine may have other work."""
    import resource

    from torch._inductor.compile_fx import compile_fx

    from models.wide_resnet import recipe

    def spent() -> float:
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    step, batches = recipe(depth=40, width=1, batch_size=8, num_batches=1)
    captured = sx.capture(step, batches[0])
    assert len(captured.programs["step"].graph.nodes) > 3000
    registered(Wrong(of(aten.threshold_backward.default), compile_fx))
    before, begun = spent(), time.perf_counter()
    location = located((captured, batches[0]))
    assert location.verdict == "node"
    first = calls(captured.programs["step"].graph, aten.threshold_backward.default)[0]
    assert location.node == first.name
    assert min(spent() - before, time.perf_counter() - begun) < 120


@pytest.mark.wide
def test_a_lowering_of_inductors_that_is_wrong_is_found_from_the_session_on(
    deep: Deeply, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor itself writes wrong code; nothing but its caches' being off is changed beside."""
    from torch._inductor import config, lowering

    right = lowering.lowerings[aten.gelu.default]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return lowering.mul(right(*args, **kwargs), 1.5)

    monkeypatch.setitem(lowering.lowerings, aten.gelu.default, wrong)
    captured, batch = deep
    with config.patch(force_disable_caches=True):
        location = locate(captured, "torch-compile", batch)
    assert location.verdict == "node"
    assert location.node == "gelu"
    assert "loss" in location.differing
    assert location.fault.ways == {"eager": True, "aot_eager": True, "inductor": False}
