"""The demonstration's parts, on a small model; `scripts/demo` itself runs the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import sam_export as sx
from models import digits_cnn
from models.digits import Digits, load_digits
from sam_export.artifact.state_file import write_state
from scripts import demo

ROOT = Path(__file__).parents[2]
EPOCHS = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small digits CNN trained for some steps, eager and from its ONNX artifact."""
    pytest.importorskip("onnxruntime", reason="needs an ort extra")
    out = tmp_path_factory.mktemp("demo")
    step, batches = digits_cnn.recipe(demo.SEED, demo.BATCH_SIZE, lr=demo.LR, channels=4)
    sx.export(sx.capture(step, batches[0]), out / "onnx", target="onnx")
    session = sx.load(out / "onnx", threads=demo.THREADS)
    whole = load_digits(demo.SEED)
    # 158 = 2 * 64 + 30: the last batch of an epoch is a smaller one.
    digits = Digits(whole.train_x[:158], whole.train_y[:158], whole.test_x, whole.test_y)
    train, test = demo.write_data(out, digits, session)
    trainees = [demo.eager_trainee(step), demo.session_trainee(session)]
    demo.train_side_by_side(trainees, session, train, digits, EPOCHS)
    write_state(out / "final_state.safetensors", session.state)
    return SimpleNamespace(out=out, train=train, test=test, trainees=trainees)


def test_both_trainings_have_the_same_losses_and_learn(trained: SimpleNamespace) -> None:
    eager, onnx = trained.trainees
    assert len(eager.losses) == len(onnx.losses) == 3 * EPOCHS
    np.testing.assert_allclose(onnx.losses, eager.losses, rtol=1e-4)
    assert eager.losses[-1] < eager.losses[0]
    assert eager.accuracy == pytest.approx(onnx.accuracy, abs=0.01)
    assert len(onnx.step_ms) == len(onnx.losses)


def test_the_printed_command_repeats_the_training_without_torch(trained: SimpleNamespace) -> None:
    command = demo.train_command(trained.out / "onnx", trained.train, trained.test, EPOCHS)
    program, *arguments = command.split()
    assert program == "sam-export"
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from sam_export.cli import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = load_file(trained.out / "final_state.safetensors")
    theirs = load_file(trained.out / "trained.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def fake_report(*verdicts: bool) -> Any:
    targets = [
        SimpleNamespace(name=f"target-{index}", ok=ok, free_running=(1e-6, 2e-6))
        for index, ok in enumerate(verdicts)
    ]
    tolerances = SimpleNamespace(drift=0.02)
    return SimpleNamespace(ok=all(verdicts), targets=targets, tolerances=tolerances)


def test_table_has_losses_accuracies_times_and_verdicts() -> None:
    trainee = demo.Trainee("eager PyTorch", print, print, [2.5, 0.125], [9.0, 1.0, 2.0], 0.9876)
    lines = demo.table([trainee], fake_report(True, False)).splitlines()
    assert lines[1].split() == ["eager", "PyTorch", "2.5000000", "0.1250000", "98.76%", "2.00"]
    assert lines[4].split()[-2:] == ["target-0", "OK"]
    assert lines[5].split()[-2:] == ["target-1", "FAILED"]


@pytest.mark.parametrize(
    ("accuracy", "parity", "code"),
    [(0.98, True, 0), (0.97, True, 1), (0.98, False, 1), (0.5, False, 1)],
)
def test_exit_code_tells_whether_accuracy_and_parity_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: float, parity: bool, code: int
) -> None:
    def train(trainees: list[demo.Trainee], *_: Any) -> None:
        for trainee in trainees:
            trainee.losses, trainee.step_ms, trainee.accuracy = [1.0, 0.5], [1.0, 1.0], accuracy

    specs = (SimpleNamespace(name="x"), SimpleNamespace(name="y"))
    data = {"digits_train.npz", "digits_test.npz", "digits.safetensors"}
    session = SimpleNamespace(
        contract=SimpleNamespace(batch=specs), state={"w": np.zeros(1, np.float32)}
    )
    monkeypatch.setattr(sx, "capture", lambda *_: None)
    monkeypatch.setattr(sx, "export", lambda *_, **__: None)
    monkeypatch.setattr(sx, "load", lambda *_, **__: session)
    monkeypatch.setattr(demo.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(demo, "train_side_by_side", train)
    monkeypatch.setattr(demo, "check", lambda _: fake_report(parity))
    assert demo.main(["--out", str(tmp_path / "out"), "--epochs", "1"]) == code
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {*data, "final_state.safetensors", "demo.png"}
