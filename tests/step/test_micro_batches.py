"""A batch in parts inside the step: against the unsplit step, and a loop written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export._compat import torchscript
from sam_export.errors import SessionError, StepConfigError
from sam_export.step.micro_batches import split
from tests.tracing.test_capture import Runner, worst_change

RHO = 0.2
PARTS = 3


class Net(nn.Module):
    """Batch statistics and dropout, each if asked for."""

    def __init__(self, norm: bool, dropout: bool) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8, bias=not norm)  # its true gradient would be zero
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(0.4) if dropout else nn.Identity()
        self.b = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def made(
    norm: bool = False, dropout: bool = False, options: dict[str, Any] | None = None, **chosen: Any
) -> sx.TrainStep:
    torch.manual_seed(0)
    net = Net(norm, dropout).double()
    sam = sx.SAM(
        net.parameters(), torch.optim.SGD, rho=RHO, lr=0.1, momentum=0.9, weight_decay=0.01,
        **(options or {}),
    )  # fmt: skip
    return sx.TrainStep(net, nn.CrossEntropyLoss(), sam, semantics=sx.Semantics(**chosen), seed=7)


def data(count: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 6, dtype=torch.float64, generator=generator),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def run(
    step: sx.TrainStep, graph: bool, batches: list[Any], folder: Path | None = None
) -> tuple[list[Any], dict[str, Tensor]]:
    """Results of each step, and the state after the last, eagerly or of the captured graph."""
    if graph and folder is not None:
        sx.export(sx.capture(step, batches[0]), folder, target="torchscript")
        session = sx.load(folder)
        steps = [vars(session.step(*batch)) for batch in batches]
        return steps, {name: torch.from_numpy(v) for name, v in session.state.items()}
    if graph:
        runner = Runner(sx.capture(step, batches[0]))
        return [runner.step(batch) for batch in batches], runner.state
    results = [vars(step(*batch)) for batch in batches]
    named = {**dict(step.model.named_parameters()), **dict(step.model.named_buffers())}
    return results, {name: value.detach() for name, value in named.items()}


METRICS = ("loss", "perturbed_loss", "grad_norm", "perturbation_norm")
UNSPLIT: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay ascended": {"decay_in_ascent": True},
    "clipped": {"clip_norm": 0.05},
    "three ascent steps": {"options": {"ascent_steps": 3}},
    "adaptive": {"options": {"perturbation": sx.ASAM(0.01)}},
    "GSAM": {"options": {"variant": sx.GSAM(0.4)}},
    "Friendly SAM": {"options": {"variant": sx.FriendlySAM()}},
    "periodic": {"options": {"every": 2}},
    "LookSAM": {"options": {"every": 2, "variant": sx.LookSAM()}},
}


@pytest.mark.parametrize(
    ("name", "graph"),
    [(name, False) for name in UNSPLIT] + [(name, True) for name in ("clipped", "GSAM", "LookSAM")],
)
def test_one_perturbation_for_the_batch_is_the_unsplit_step(
    name: str, graph: bool, tmp_path: Path
) -> None:
    """The loss is a mean over examples and nothing looks at the whole batch."""
    batches = data(3)
    start = {n: p.detach().clone() for n, p in made().model.named_parameters()}
    folder = tmp_path / "step" if "every" in UNSPLIT[name].get("options", {}) else None
    found, state = run(made(micro_batches=PARTS, **UNSPLIT[name]), graph, batches, folder)
    wanted, expected = run(made(**UNSPLIT[name]), False, batches)
    for a, b in zip(found, wanted, strict=True):
        for metric in METRICS:
            assert float(a[metric]) == pytest.approx(float(b[metric]), rel=1e-12, abs=1e-14)
    assert worst_change(start, state, expected) < 1e-12


def test_it_is_another_step_with_batch_statistics() -> None:
    """Each part has its own: the law above does not hold of everything."""
    batches = data(2)
    start = dict(made(norm=True).model.state_dict())
    _, state = run(made(norm=True, micro_batches=PARTS), False, batches)
    _, other = run(made(norm=True), False, batches)
    assert worst_change(start, state, other) > 1e-3


def by_hand(step: sx.TrainStep, batches: list[Any], per: str, stats: str) -> list[dict[str, float]]:
    """The loop, in place on the step's model, with SGD written out; no dropout."""
    net = step.model
    parameters = list(net.parameters())
    momentum: list[Tensor] = []
    results = []

    def mean_gradient(members: list[Any]) -> tuple[float, list[Tensor]]:
        total, sums = 0.0, [torch.zeros_like(p) for p in parameters]
        for x, y in members:
            loss = nn.functional.cross_entropy(net(x), y)
            for s, g in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                s += g / len(members)
            total += float(loss.detach()) / len(members)
        return total, sums

    def length(gradients: list[Tensor]) -> Tensor:
        return torch.cat([g.flatten() for g in gradients]).norm()

    for x, y in batches:
        parts = list(zip(x.chunk(PARTS), y.chunk(PARTS), strict=True))
        rounds = [parts] if per == "batch" else [[part] for part in parts]
        g = [torch.zeros_like(p) for p in parameters]
        g_adv = [torch.zeros_like(p) for p in parameters]
        losses, perturbed, lengths = [], [], []
        for members in rounds:
            loss, own = mean_gradient(members)
            buffers = [b.clone() for b in net.buffers()]
            old = [p.detach().clone() for p in parameters]
            eps = [RHO * v / length(own) for v in own]
            with torch.no_grad():
                for p, e in zip(parameters, eps, strict=True):
                    p.add_(e)
            second, adversarial = mean_gradient(members)
            with torch.no_grad():
                for p, w in zip(parameters, old, strict=True):
                    p.copy_(w)
                if stats == "ascent":
                    for b, kept in zip(net.buffers(), buffers, strict=True):
                        b.copy_(kept)
            for total, value in zip((*g, *g_adv), (*own, *adversarial), strict=True):
                total += value / len(rounds)
            losses.append(loss)
            perturbed.append(second)
            lengths.append(float(length(eps)))
        count = len(rounds)
        results.append(
            {
                "loss": sum(losses) / count,
                "perturbed_loss": sum(perturbed) / count,
                "grad_norm": float(length(g)),
                "perturbation_norm": sum(lengths) / count,
            }
        )
        with torch.no_grad():
            decayed = [v + 0.01 * p for p, v in zip(parameters, g_adv, strict=True)]
            momentum = (
                [0.9 * m + v for m, v in zip(momentum, decayed, strict=True)]
                if momentum
                else decayed
            )
            for p, m in zip(parameters, momentum, strict=True):
                p.sub_(0.1 * m)
    return results


@pytest.mark.parametrize(
    ("per", "stats", "graph"),
    [
        *(("batch", stats, graph) for stats, graph in (("ascent", False), ("both", True))),
        *(("micro_batch", stats, graph) for stats in ("ascent", "both") for graph in (False, True)),
    ],
)
def test_both_meanings_equal_a_loop(per: str, stats: str, graph: bool) -> None:
    """With BatchNorm, so that running statistics and their order count."""
    batches = data(3)
    loop = made(norm=True)
    start = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    start |= {n: b.detach().clone() for n, b in loop.model.named_buffers()}
    wanted = by_hand(loop, batches, per, stats)
    expected = {n: p.detach() for n, p in loop.model.named_parameters()}
    expected |= dict(loop.model.named_buffers())
    step = made(norm=True, micro_batches=PARTS, perturbation_per=per, running_stats=stats)
    found, state = run(step, graph, batches)
    for a, b in zip(found, wanted, strict=True):
        for metric in METRICS:
            assert float(a[metric]) == pytest.approx(b[metric], rel=1e-11)
    assert worst_change(start, state, expected) < 1e-9


@pytest.mark.parametrize("per", ["batch", "micro_batch"])
def test_each_part_draws_its_own_numbers_and_both_passes_the_same(per: str) -> None:
    """With rho = 0 both passes see one function: equal losses say equal draws."""
    step = made(dropout=True, micro_batches=PARTS, perturbation_per=per)
    for group in step.optimizer.param_groups:
        group["rho"] = 0.0
    x, y = data(1, size=4)[0]
    x, y = x.repeat(PARTS, 1), y.repeat(PARTS)  # the same examples in each part
    result = step(x, y)
    assert float(result.loss) == float(result.perturbed_loss)
    first, second, third = result.outputs.chunk(PARTS)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(first, third)


@pytest.mark.parametrize(
    ("per", "randomness", "generator"),
    [
        ("batch", "same", "philox"),
        ("micro_batch", "same", "philox"),
        ("micro_batch", "fresh", "philox"),
        ("micro_batch", "same", "torch"),
    ],
)
def test_dropout_in_the_graph_is_that_of_eager(per: str, randomness: str, generator: str) -> None:
    """Also with a draw for each pass, and from torch's generator."""
    chosen = {
        "perturbation_per": per, "micro_batches": PARTS, "randomness": randomness,
        "generator": generator,
    }  # fmt: skip
    eager, captured = made(dropout=True, **chosen), made(dropout=True, **chosen)
    batches = data(2)
    start = {n: p.detach().clone() for n, p in eager.model.named_parameters()}
    runner = Runner(sx.capture(captured, batches[0]))
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        wanted = eager(*batch)
        torch.manual_seed(index)
        found = runner.step(batch)
        assert float(found["perturbed_loss"]) == pytest.approx(
            float(wanted.perturbed_loss), rel=1e-12
        )
    expected = {n: p.detach() for n, p in eager.model.named_parameters()}
    assert worst_change(start, runner.state, expected) < 1e-11


def test_outputs_are_concatenated() -> None:
    """In the order of the batch, as those of the unsplit step."""
    batch = data(1)[0]
    whole = made()(*batch).outputs
    for per in ("batch", "micro_batch"):
        step = made(micro_batches=PARTS, perturbation_per=per)
        assert torch.allclose(step(*batch).outputs, whole)
    captured = sx.capture(made(micro_batches=PARTS), batch, return_outputs=True)
    (spec,) = [s for s in captured.contract.program("step").outputs if s.role == "output"]
    assert spec.shape == ("batch", 4)
    assert torch.allclose(torch.as_tensor(Runner(captured).step(batch)["output"]), whole)


def test_clipping_is_of_the_mean() -> None:
    """Clipping each part and then averaging would give another norm."""
    batch = data(1)[0]
    free = made(micro_batches=PARTS, perturbation_per="micro_batch", clip_norm=100.0)(*batch)
    step = made(micro_batches=PARTS, perturbation_per="micro_batch", clip_norm=0.01)
    start = [p.detach().clone() for p in step.model.parameters()]
    clipped = step(*batch)
    assert float(clipped.perturbed_grad_norm) == float(free.perturbed_grad_norm)
    moved = [
        (w - p.detach()) / 0.1 - 0.01 * w
        for w, p in zip(start, step.model.parameters(), strict=True)
    ]
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("per", ["batch", "micro_batch"])
@pytest.mark.parametrize("part", range(PARTS))
def test_a_number_that_is_not_finite_in_any_part_changes_nothing(per: str, part: int) -> None:
    """Whichever part it is in."""
    x, y = data(1)[0]
    x = x.clone()
    x[4 * part] = float("inf")
    step = made(norm=True, micro_batches=PARTS, perturbation_per=per)
    before = {n: v.clone() for n, v in step.model.state_dict().items()}
    assert not bool(step(x, y).finite)
    assert all(torch.equal(v, before[n]) for n, v in step.model.state_dict().items())


@pytest.mark.parametrize("target", ["onnx", "torchscript"])
def test_a_session_refuses_a_size_that_is_no_multiple(target: str, tmp_path: Path) -> None:
    """In training; evaluation takes any size. The graph works at other multiples."""
    captured = sx.capture(made(norm=True, micro_batches=PARTS), data(1)[0])
    assert captured.contract.multiples == {"batch": PARTS}
    assert captured.contract.dims == {"batch": 2 * PARTS}
    sx.export(captured, tmp_path / "step", target=target)
    session = sx.load(tmp_path / "step")
    eager = made(norm=True, micro_batches=PARTS)
    for size in (6, 15):
        batch = data(1, size)[0]
        found, wanted = session.step(*batch), eager(*batch)
        assert float(found.loss) == pytest.approx(float(wanted.loss), rel=1e-12)
    before = session.state
    with pytest.raises(SessionError, match="multiple of 3.*Leave 1 out"):
        session.step(*data(1, 13)[0])
    with pytest.raises(SessionError, match="at least 6"):
        session.step(*data(1, 3)[0])
    assert all((session.state[name] == value).all() for name, value in before.items())
    assert session.evaluate(data(1, 7)[0][0]).shape == (7, 4)
    if target == "torchscript":
        module = torchscript.load_scripted(tmp_path / "step" / "step.pt", torch.device("cpu"))
        with pytest.raises(torch.jit.Error, match="multiple of 3"):
            module.step(*data(1, 13)[0])


def test_a_fixed_batch_and_a_dict_of_sizes() -> None:
    """dynamic=None fixes the size; marks that contradict the sizes are refused."""
    batch = data(1)[0]
    assert sx.capture(made(micro_batches=PARTS), batch, dynamic=None).contract.multiples == {}
    marked = {"input": {0: "batch"}, "target": {0: "batch"}}
    name = sx.capture(made(), batch).contract.batch[0].name
    marked[name] = marked.pop("input")
    assert sx.capture(made(micro_batches=PARTS), batch, dynamic=marked).contract.multiples == {
        "batch": PARTS
    }
    with pytest.raises(StepConfigError, match="to be the other way"):
        sx.capture(made(micro_batches=PARTS), batch, dynamic={name: {0: "batch"}})


def test_what_has_another_size_goes_to_every_part() -> None:
    """A mask for all examples and a scalar are shared."""
    x, mask, weight = torch.arange(12.0).reshape(6, 2), torch.ones(2, 2), torch.tensor(0.5)
    parts = split(["x", "mask", "weight"], [x, mask, weight], 3)
    assert [len(part) for part in parts] == [3, 3, 3]
    assert all(part[1] is mask and part[2] is weight for part in parts)
    assert torch.equal(torch.cat([part[0] for part in parts]), x)


def test_refusals() -> None:
    """With what was asked and what to do."""
    with pytest.raises(StepConfigError, match="micro_batches=0"):
        sx.Semantics(micro_batches=0)
    with pytest.raises(StepConfigError, match="micro_batches=True"):
        sx.Semantics(micro_batches=True)
    with pytest.raises(StepConfigError, match="multiple of 5"):
        made(micro_batches=5)(*data(1)[0])
    with pytest.raises(StepConfigError, match="multiple of 5"):
        sx.capture(made(micro_batches=5), data(1)[0])
    for variant in (sx.FriendlySAM(), sx.LookSAM()):
        options = {"variant": variant, "every": 2 if isinstance(variant, sx.LookSAM) else 1}
        with pytest.raises(StepConfigError, match="each part of a batch would have another"):
            made(micro_batches=2, perturbation_per="micro_batch", options=options)


def test_the_choice_is_in_the_manifest(tmp_path: Path) -> None:
    """And read back."""
    step = made(micro_batches=PARTS, perturbation_per="micro_batch")
    artifact = sx.export(sx.capture(step, data(1)[0]), tmp_path / "step", target="onnx")
    assert artifact.semantics.micro_batches == PARTS
    assert artifact.semantics.perturbation_per == "micro_batch"
    assert artifact.contract.multiples == {"batch": PARTS}


def test_parts_may_follow_the_statistics_of_the_last_one() -> None:
    """BatchNorm reads running statistics that the second pass of the last part has changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    semantics = sx.Semantics(running_stats="both", micro_batches=2, perturbation_per="micro_batch")
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=semantics)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    session = sx.load(sx.capture(step, (x, y)), target="torchscript")
    session.step(x, y)
    step(x, y)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(session.state[name]), value, rtol=0, atol=1e-13)


def test_onnx_runtime_is_given_as_many_random_numbers_as_a_part_has() -> None:
    """Half a batch of rows of seven: the session knows the size of the batch alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Dropout(0.4), nn.Linear(7, 3)).double()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    semantics = sx.Semantics(micro_batches=2, perturbation_per="micro_batch")
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=semantics, seed=5)
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.randint(0, 3, (10,))
    session = sx.load(sx.capture(step, (x, y)), target="onnx")
    for size in (10, 6):
        session.step(x[:size], y[:size])
        step(x[:size], y[:size])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(session.state[name]), value, rtol=0, atol=1e-13)
