"""What `capture` makes: one functional graph per program, right at other sizes than the example."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export._compat import origins
from tests.step.test_sam import batches, small_model
from tests.step.test_train_step import Peculiar, TwoInputs, WithStatistics, two_targets


class Convolutional(nn.Module):
    """Ten channels and ten classes, like the example batch: equal sizes must not be confused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64), labels


def sequences(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.randn(count, 4, 5, generator=generator, dtype=torch.float64), labels


MODELS = {
    "convolution": (Convolutional, images),
    "attention": (Attention, sequences),
    "lstm": (Recurrent, sequences),
}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05, "amsgrad": True}),
}


def make(
    model: nn.Module, optimizer: str = "nesterov", semantics: sx.Semantics | None = None
) -> sx.TrainStep:
    base, options = OPTIMIZERS[optimizer]
    sam = sx.SAM(model.parameters(), base, rho=0.05, **options)
    return sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=semantics)


class Runner:
    """Runs the captured graph itself and feeds its state back, as every target must."""

    def __init__(self, captured: sx.CapturedStep) -> None:
        self.contract = captured.contract
        self.program = captured.programs["step"].module(check_guards=False)
        self.state = {name: torch.from_numpy(v.copy()) for name, v in captured.state.items()}

    def step(self, batch: Sequence[Tensor], **hyper: Sequence[float]) -> dict[str, Tensor]:
        spec = self.contract.program("step")
        given = {
            **self.state,
            **dict(zip((s.name for s in self.contract.batch), batch, strict=True)),
        }
        for item in self.contract.hyper:
            values = hyper.get(item.name, item.defaults)
            given[f"hyper.{item.name}"] = torch.tensor(values, dtype=torch.float64)
        results = self.program(*(given[name] for name in spec.inputs))
        named = dict(zip((s.name for s in spec.outputs), results, strict=True))
        self.state.update({source: named[name] for name, source in spec.feeds.items()})
        return named


def worst_change(
    before: dict[str, Tensor], found: dict[str, Tensor], expected: dict[str, Tensor]
) -> float:
    """Largest error of a tensor's change relative to that change."""
    worst = 0.0
    for name, wanted in expected.items():
        moved = (wanted.double() - before[name].double()).norm()
        error = (found[name].double() - wanted.double()).norm()
        worst = max(worst, float(error / moved) if moved else float(error))
    return worst


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_equals_eager_at_other_batch_sizes(name: str) -> None:
    """Captured at 10 examples; float64, so that only a wrong formula can differ."""
    torch.manual_seed(0)
    build, data = MODELS[name]
    model = build().double()
    step = make(model)
    captured = sx.capture(step, data(10))
    runner = Runner(captured)
    before = {n: v.clone() for n, v in runner.state.items()}
    for count in (10, 3, 17, 2):
        named, result = runner.step(data(count)), step(*data(count))
        assert float(named["loss"]) == pytest.approx(float(result.loss), rel=1e-10)
        assert float(named["grad_norm"]) == pytest.approx(float(result.grad_norm), rel=1e-9)
    expected = {n: v.detach() for n, v in (*model.named_parameters(), *model.named_buffers())}
    # A bias before BatchNorm has a true gradient of zero: its change is rounding noise.
    noise = {n for n in expected if n == "conv.bias"}
    rest = {n: v for n, v in expected.items() if n not in noise}
    assert worst_change(before, runner.state, rest) < 1e-9


def test_capture_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = WithStatistics()
    model.drop.eval()
    step = make(model, "adamw")
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    sx.capture(step, batches(1)[0])
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert not step.optimizer.state
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_newer_settings_of_precision(tmp_path: Path) -> None:
    """torch.export itself fails after them; capture and export leave them as they were."""
    step = make(WithStatistics(), "adamw")
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    rounds = rnn.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        with pytest.raises(RuntimeError, match="allow_tf32"):
            _ = torch.backends.cudnn.allow_tf32
        captured = sx.capture(step, batches(1)[0])
        for target in ("onnx", "torchscript", "torch-compile"):
            sx.export(captured, tmp_path / target, target)
        sx.load(tmp_path / "torch-compile").export_model(tmp_path / "model.pt2")
        with pytest.raises(RuntimeError, match="allow_tf32"):
            _ = torch.backends.cudnn.allow_tf32
        assert (conv.fp32_precision, rnn.fp32_precision) == ("ieee", rounds)
    finally:
        torch._C._set_cudnn_allow_tf32(True)  # both, and the older setting can be read again


def test_capture_in_the_middle_of_a_run_goes_on_from_there() -> None:
    model = small_model(torch.float64)
    step = make(model, "adamw")
    for batch in batches(3, torch.float64):
        step(*batch)
    runner = Runner(sx.capture(step, batches(1, torch.float64)[0]))
    before = {n: v.clone() for n, v in runner.state.items()}
    step(*batches(1, torch.float64)[0])
    runner.step(batches(1, torch.float64)[0])
    expected = {n: p.detach() for n, p in model.named_parameters()}
    assert worst_change(before, runner.state, expected) < 1e-11


def test_the_contract_names_everything() -> None:
    torch.manual_seed(0)
    step = make(WithStatistics(), "adamw", sx.Semantics(randomness="fresh"))
    captured = sx.capture(step, batches(1)[0], return_outputs=True)
    contract = captured.contract
    assert [s.name for s in contract.batch] == ["x", "target"]
    assert contract.batch[0].shape == ("batch", 5)
    assert contract.dims == {"batch": 2}  # BatchNorm1d refuses a single example
    assert contract.program("evaluate").outputs[0].shape == ("batch", 3)
    roles = {s.name: s.role for s in contract.state}
    assert roles["first.weight"] == "parameter"
    assert roles["norm.running_mean"] == "buffer"
    slot = next(s for s in contract.state if s.name == "slot.step.first.weight")
    assert (slot.dtype, slot.eager_dtype, slot.slot) == ("float64", "float32", "step")
    outputs = [s.name for s in contract.program("step").outputs]
    assert outputs[:6] == [
        "loss",
        "perturbed_loss",
        "grad_norm",
        "perturbation_norm",
        "finite",
        "output",
    ]
    assert (roles["rng.seed"], roles["counter.step"]) == ("rng", "counter")
    assert set(contract.program("step").feeds.values()) == set(roles) - {"rng.seed"}
    assert "rng.seed" not in contract.program("evaluate").inputs
    assert type(contract).from_dict(contract.to_dict()) == contract


def test_frozen_unused_and_tied_parameters_are_inputs_only() -> None:
    torch.manual_seed(0)
    model = Peculiar()
    captured = sx.capture(make(model), batches(1)[0])
    fed = set(captured.contract.program("step").feeds.values())
    assert fed == {"embed.weight", "slot.momentum_buffer.embed.weight"}
    state = {s.name: s for s in captured.contract.state}
    assert "head.weight" not in state  # tied: once, under its first name
    assert not state["unused"].trainable
    assert not state["frozen"].trainable


def test_groups_have_their_own_lr_rho_and_decay() -> None:
    model = small_model(torch.float64)
    groups = [
        {"params": list(model[0].parameters()), "rho": 0.3, "lr": 0.2, "weight_decay": 0.1},
        {"params": list(model[2].parameters()), "rho": 0.01},
    ]
    sam = sx.SAM(groups, torch.optim.SGD, lr=0.05, momentum=0.9)
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam)
    runner = Runner(sx.capture(step, batches(1, torch.float64)[0]))
    before = {n: v.clone() for n, v in runner.state.items()}
    for batch in batches(3, torch.float64):
        named, result = runner.step(batch), step(*batch)
        assert float(named["perturbation_norm"]) == pytest.approx(
            float(result.perturbation_norm), rel=1e-12
        )
    # Hyper-parameters are inputs: a schedule needs no new capture.
    sam.param_groups[0]["lr"], sam.param_groups[1]["rho"] = 0.01, 0.5
    batch = batches(1, torch.float64)[0]
    step(*batch)
    runner.step(batch, lr=[0.01, 0.05], rho=[0.3, 0.5])
    expected = {n: p.detach() for n, p in model.named_parameters()}
    assert worst_change(before, runner.state, expected) < 1e-12


def test_dict_batches_and_structured_outputs() -> None:
    torch.manual_seed(0)
    model = TwoInputs()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    step = sx.TrainStep(model, two_targets, sam, num_targets=2)
    batch = {
        "left": torch.randn(6, 5),
        "right": torch.randn(6, 4),
        "label": torch.randint(0, 3, (6,)),
        "weight": torch.rand(6),
    }
    contract = sx.capture(step, batch).contract
    assert contract.batch_kind == "dict"
    assert [s.name for s in contract.program("evaluate").outputs] == [
        "output.logits",
        "output.extra",
    ]
    assert contract.program("evaluate").inputs[-2:] == ("left", "right")


def test_nodes_know_the_module_they_come_from_backward_too() -> None:
    torch.manual_seed(0)
    program = sx.capture(make(Convolutional().double()), images(4)).programs["step"]
    found = {
        str(node.target).removeprefix("aten.").removesuffix(".default"): set()
        for node in program.graph.nodes
    }
    for node in program.graph.nodes:
        name = str(node.target).removeprefix("aten.").removesuffix(".default")
        found[name].add(origins.origin_of(node))
    assert found["convolution"] == {"ascent/conv", "descent/conv"}
    assert found["convolution_backward"] == {"ascent/conv", "descent/conv"}
    assert found["native_batch_norm_backward"] == {"ascent/norm", "descent/norm"}


def test_an_example_of_one_is_still_symbolic() -> None:
    x, y = batches(1)[0]
    step = make(small_model())
    captured = sx.capture(step, (x[:1], y[:1]))
    assert captured.contract.dims == {"batch": 1}
    runner, plain = Runner(captured), make(copy.deepcopy(step.model))
    for count in (6, 1):
        named, result = runner.step((x[:count], y[:count])), plain(x[:count], y[:count])
        assert float(named["loss"]) == pytest.approx(float(result.loss), rel=1e-6)
