"""``sam-export train``: a run, its files, stopping and resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sam_export
from sam_export.artifact.state_file import read_state
from sam_export.cli import main
from tests.cli.conftest import Workplace

pytest.importorskip("onnxruntime")

Train = Callable[..., int]

INTERRUPTED_AT = 7
STEPS_PER_EPOCH = 4  # 50 examples in batches of 16, the last one of 2


@pytest.fixture
def train(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the command in an empty folder on the small artifact and its data."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, data: str | None = None) -> int:
        start = ["train", str(workplace.artifact), "--data", data or str(workplace.train)]
        return main([*start, *argv])

    return run


def log_of(path: str) -> list[dict[str, Any]]:
    """The lines of a metrics log."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same_state(one: str, other: str) -> bool:
    """Whether two state files hold the same tensors, bit for bit."""
    first, second = read_state(Path(one)), read_state(Path(other))
    return first.keys() == second.keys() and all(
        value.tobytes() == second[name].tobytes() for name, value in first.items()
    )


def test_training_learns_and_reports(
    train: Train, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--epochs", "12", "--batch-size", "16", "--validate", str(workplace.test)]
    assert train(*argv, "--log", "log/metrics.jsonl", "--save-state", "final.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("SGD in SAM, onnx on cpu by CPUExecutionProvider: 12 epochs of 50 examples")
    assert lines[1].startswith("epoch 1/12  loss ")
    assert "  validation loss 0." in lines[12]
    assert float(lines[12].split("accuracy ")[1].removesuffix("%")) > 60
    assert lines[13] == "written: log/metrics.jsonl, final.safetensors"

    log = log_of("log/metrics.jsonl")
    assert [line["step"] for line in log] == list(range(1, 12 * STEPS_PER_EPOCH + 1))
    assert [line["epoch"] for line in log[3:5]] == [1, 2]
    assert list(log[0]) == [
        *("step", "epoch", "loss", "perturbed_loss", "grad_norm", "lr", "rho", "finite")
    ]
    assert log[0]["lr"] == 0.1
    assert log[0]["rho"] == 0.05
    assert log[0]["finite"] is True
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert set(read_state(Path("final.safetensors"))) == {
        spec.name for spec in sam_export.load(workplace.artifact).contract.state
    }


def test_it_is_the_session_s_own_step(train: Train, workplace: Workplace) -> None:
    assert train("--batch-size", "16", "--seed", "5", "--save-state", "cli.safetensors") == 0
    session = sam_export.load(workplace.artifact)
    with np.load(workplace.train) as file:
        x, y = file["input"], file["target"]
    order = np.random.default_rng([5, 0]).permutation(50)
    for start in range(0, 50, 16):
        part = order[start : start + 16]
        session.step(x[part], y[part])
    state = read_state(Path("cli.safetensors"))
    for name, value in session.state.items():
        assert np.array_equal(value, state[name]), name


def test_lr_rho_and_schedule(train: Train) -> None:
    argv = ["--epochs", "2", "--batch-size", "16", "--lr", "0.4", "--rho", "0.2"]
    assert train(*argv, "--lr-schedule", "cosine", "--log", "log.jsonl") == 0
    log = log_of("log.jsonl")
    expected = [0.2 * (1 + np.cos(np.pi * done / 8)) for done in range(8)]
    assert [line["lr"] for line in log] == pytest.approx(expected, rel=1e-12)
    assert {line["rho"] for line in log} == {0.2}


def test_schedule_scales_the_artifact_s_lr(train: Train) -> None:
    argv = ["--epochs", "3", "--batch-size", "50", "--lr-schedule", "step:1:0.5"]
    assert train(*argv, "--log", "log.jsonl") == 0
    assert [line["lr"] for line in log_of("log.jsonl")] == pytest.approx([0.1, 0.05, 0.025])


SCHEDULED = ["--epochs", "4", "--batch-size", "16", "--seed", "9", "--lr-schedule", "cosine"]


def test_interrupted_and_resumed_equals_uninterrupted(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert train(*SCHEDULED, "--log", "whole.jsonl", "--save-state", "whole.safetensors") == 0

    original = sam_export.Session.step

    def step(self: Any, *batch: Any, **hyper: Any) -> Any:
        if self.step_count == INTERRUPTED_AT - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *batch, **hyper)

    with monkeypatch.context() as patch:
        patch.setattr(sam_export.Session, "step", step)
        capsys.readouterr()
        assert train(*SCHEDULED, "--checkpoint", "run.ckpt", "--log", "parts.jsonl") == 130
    text = capsys.readouterr().err
    assert "stopping after this step" in text
    assert f"interrupted after step {INTERRUPTED_AT}: epoch 2 of 4, step 3 of 4 in it" in text
    assert "saved: run.ckpt" in text
    assert "--resume run.ckpt" in text.splitlines()[-1]
    assert len(log_of("parts.jsonl")) == INTERRUPTED_AT
    assert signal.getsignal(signal.SIGINT) is before

    argv = ["--resume", "run.ckpt", "--log", "parts.jsonl", "--save-state", "parts.safetensors"]
    assert train(*argv) == 0
    assert same_state("whole.safetensors", "parts.safetensors")
    assert log_of("whole.jsonl") == log_of("parts.jsonl")

    assert train("--resume", "run.ckpt", "--log", "parts.jsonl") == 0
    assert "Nothing to do: 16 steps are all that 4 epochs have" in capsys.readouterr().out
    assert log_of("whole.jsonl") == log_of("parts.jsonl")


def test_second_interrupt_stops_at_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    monkeypatch.setattr(sam_export.Session, "step", step)
    assert train("--checkpoint", "run.ckpt") == 130
    assert not Path("run.ckpt").exists()


def test_interrupt_without_checkpoint_says_what_is_lost(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = sam_export.Session.step

    def step(self: Any, *batch: Any, **hyper: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch, **hyper)

    monkeypatch.setattr(sam_export.Session, "step", step)
    assert train() == 128 + signal.SIGTERM
    assert "no --checkpoint was given: the trained state is lost" in capsys.readouterr().err


def test_resume_from_an_older_checkpoint_drops_later_log_lines(train: Train) -> None:
    assert train(*SCHEDULED, "--log", "whole.jsonl", "--save-state", "whole.safetensors") == 0
    argv = ["--checkpoint", "run.ckpt", "--checkpoint-every", "3", "--log", "parts.jsonl"]
    assert train(*SCHEDULED, *argv) == 0
    lines = Path("whole.jsonl").read_text()
    Path("parts.jsonl").write_text(lines + '{"step": 17, "epo')  # as a crash leaves it
    assert train("--resume", "run.ckpt", "--epochs", "5", "--log", "parts.jsonl") == 0
    assert [line["step"] for line in log_of("parts.jsonl")] == list(range(1, 21))


def test_resume_refuses_another_order_of_batches(
    train: Train, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--batch-size", "16", "--checkpoint", "run.ckpt") == 0
    before = Path("run.ckpt").read_bytes()
    assert train("--resume", "run.ckpt", "--epochs", "2", "--seed", "1") == 2
    assert "trained with seed 0, not 1" in capsys.readouterr().err
    assert train("--resume", "run.ckpt", "--epochs", "2", "--batch-size", "8") == 2
    assert "trained with batch size 16, not 8" in capsys.readouterr().err
    assert train("--resume", "run.ckpt", "--epochs", "2", data=str(workplace.test)) == 2
    assert "trained on 50 examples; " in capsys.readouterr().err
    assert Path("run.ckpt").read_bytes() == before


def test_resume_from_a_checkpoint_of_a_script(
    train: Train, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    session = sam_export.load(workplace.artifact)
    with np.load(workplace.train) as file:
        session.step(file["input"], file["target"], lr=0.03)
    session.save("script.ckpt")
    argv = ["--resume", "script.ckpt", "--batch-size", "25", "--log", "log.jsonl"]
    assert train(*argv, "--checkpoint", "new.ckpt") == 0
    assert "script.ckpt has no run settings beside it" in capsys.readouterr().out
    assert [(line["step"], line["lr"]) for line in log_of("log.jsonl")] == [(2, 0.03)]
    assert sam_export.load(workplace.artifact).step_count == 0


def test_files_of_an_earlier_run_are_not_lost(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "--checkpoint": "run.ckpt",
        "--log": "log.jsonl",
        "--save-state": "end.safetensors",
        "--export-model": "model.onnx",
    }
    for option, file in files.items():
        Path(file).write_text("precious")
        assert train(option, file) == 2
        assert f"{file} exists already" in capsys.readouterr().err
        assert Path(file).read_text() == "precious"
        assert train(option, file, "--overwrite") == 0
        assert Path(file).read_bytes() != b"precious"


def test_the_trained_model_alone(
    train: Train, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    assert train("--export-model", "model.pt") == 2
    text = capsys.readouterr()
    assert "writes a model as a .onnx file" in text.err
    assert "epoch" not in text.out  # said before the time is spent
    argv = ["--batch-size", "16", "--export-model", "out/model.onnx", "--checkpoint", "run.ckpt"]
    assert train(*argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "written: run.ckpt, out/model.onnx"
    served = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    session = sam_export.load(workplace.artifact)
    session.restore("run.ckpt")
    with np.load(workplace.test) as file:
        x = file["input"]
    (found,) = served.run(None, {"input": x})
    expected = session.evaluate(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=16 * 2.0**-23 * abs(expected).max())
    # Nothing is left to train, and the model is written all the same.
    assert train("--resume", "run.ckpt", "--export-model", "again.onnx") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "written: again.onnx"
    assert Path("again.onnx").read_bytes() == Path("out/model.onnx").read_bytes()


def test_steps_that_are_not_finite_are_counted(
    train: Train, workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(workplace.train) as file:
        x, y = file["input"], file["target"]
    x[7] = np.nan
    np.savez(tmp_path / "data.npz", input=x, target=y)
    argv = ["--batch-size", "16", "--log", "log.jsonl", "--save-state", "end.safetensors"]
    assert train(*argv, data="data.npz") == 0
    assert "1 of 4 steps not finite" in capsys.readouterr().out
    (bad,) = (line for line in log_of("log.jsonl") if not line["finite"])
    assert bad["loss"] is None
    assert all(np.isfinite(value).all() for value in read_state(Path("end.safetensors")).values())


@pytest.mark.parametrize("sized", [True, False])
def test_batches_from_a_function(
    sized: bool, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "list" if sized else "iter"
    Path("data.py").write_text(
        "import numpy as np\n"
        "def batches(epoch):\n"
        "    g = np.random.default_rng(epoch)\n"
        f"    return {kind}([(g.standard_normal((4, 4)).astype('f4'), g.integers(0, 3, 4))\n"
        "        for _ in range(3)])\n"
    )
    data = "data.py:batches"
    schedule = ["--epochs", "3", "--lr-schedule", "cosine" if sized else "step:2:0.5"]
    assert train(*schedule, "--save-state", "whole.safetensors", data=data) == 0

    original = sam_export.Session.step
    for stop_at in (3, 4):  # the end of an epoch, and the middle of one

        def step(self: Any, *batch: Any, stop_at: int = stop_at, **hyper: Any) -> Any:
            if self.step_count == stop_at - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *batch, **hyper)

        with monkeypatch.context() as patch:
            patch.setattr(sam_export.Session, "step", step)
            assert train(*schedule, "--checkpoint", "run.ckpt", "--overwrite", data=data) == 130
        argv = ["--resume", "run.ckpt", "--save-state", "parts.safetensors", "--overwrite"]
        assert train(*argv, data=data) == 0
        assert same_state("whole.safetensors", "parts.safetensors")


def test_functions_that_give_no_or_wrong_batches(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data.py").write_text(
        "import numpy as np\n"
        "def none():\n    return []\n"
        "def unsized():\n    yield np.zeros((4, 4), 'f4'), np.zeros(4, 'i8')\n"
        "def wrong():\n    yield np.zeros((4, 5), 'f4'), np.zeros(4, 'i8')\n"
    )
    assert train(data="data.py:none") == 2
    assert "The data has no batches in epoch 1." in capsys.readouterr().err
    assert train("--lr-schedule", "cosine", data="data.py:unsized") == 2
    assert "needs the number of steps in an epoch" in capsys.readouterr().err
    assert train(data="data.py:wrong") == 2
    assert "has shape [4, 5]; expected float32[batch, 4]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "--epochs 0: at least 1"),
        (["--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0: at least 1"),
        (["--threads", "0"], "--threads 0: at least 1"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--lr", "-1"], "--lr -1.0: expected a finite number of at least 0"),
        (["--rho", "nan"], "--rho nan: expected a finite number of at least 0"),
        (["--lr-schedule", "linear"], "--lr-schedule 'linear'"),
        (["--resume", "none.ckpt"], "--resume none.ckpt: there is no such file"),
        (["--device", "tpu"], "Unknown device 'tpu'"),
        (["--memory-limit", "lots"], "--memory-limit lots: expected a whole number of bytes"),
        (["--tf32"], "was given with device='cpu'"),
        (["--device", "cuda"], "CUDAExecutionProvider"),
    ],
)
def test_wrong_arguments(
    argv: list[str], message: str, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    if argv[-1] == "cuda" and "CUDAExecutionProvider" in _providers():
        pytest.skip("this machine has CUDA")
    assert train(*argv, "--checkpoint", "run.ckpt", "--log", "log.jsonl") == 2
    assert message in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def test_damaged_checkpoint_and_run_file(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--checkpoint", "run.ckpt") == 0
    settings = Path("run.ckpt.json").read_text()
    Path("run.ckpt.json").write_text("{}")
    assert train("--resume", "run.ckpt") == 2
    assert "run.ckpt.json is damaged" in capsys.readouterr().err
    Path("run.ckpt.json").write_text(settings)
    Path("run.ckpt").write_bytes(Path("run.ckpt").read_bytes()[:100])
    assert train("--resume", "run.ckpt") == 2
    assert "run.ckpt" in capsys.readouterr().err


def test_log_that_is_something_else(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--checkpoint", "run.ckpt") == 0
    Path("notes.txt").write_text("my notes\n")
    assert train("--resume", "run.ckpt", "--epochs", "2", "--log", "notes.txt") == 2
    assert "Line 1 of notes.txt is not a line of a training log" in capsys.readouterr().err
    assert Path("notes.txt").read_text() == "my notes\n"


def test_training_imports_no_torch(workplace: Workplace, tmp_path: Path) -> None:
    code = (
        "import sys; from sam_export.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "loaded = {'torch', 'onnx', 'onnxscript'} & set(sys.modules)\n"
        "sys.exit(code or (f'loaded: {loaded}' if loaded else 0))"
    )
    argv = ["train", workplace.artifact, "--data", workplace.train, "--validate", workplace.test]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv), "--checkpoint", str(tmp_path / "run.ckpt")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.count("loaded")) == (0, 0), done.stderr
