"""Sessions in processes of their own: the same numbers, and a crash that is an answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sam_export as sx
from sam_export.errors import ArtifactError, SessionError
from sam_export.parity import subjects
from sam_export.parity.child import ChildCrash, ChildSession
from tests.parity.cases import batches_for, step_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("child") / "step"
    captured = sx.capture(step_of("mlp", "float32"), batches_for("mlp", "float32")[0])
    sx.export(captured, path, target="onnx")
    return path


@pytest.fixture
def child(folder: Path) -> Iterator[ChildSession]:
    session = ChildSession(folder, "cpu", 1, False)
    yield session
    session.close()


def test_it_computes_what_a_session_here_computes(folder: Path, child: ChildSession) -> None:
    here = sx.load(folder)
    assert child.provider == here.provider
    assert child.contract == here.contract
    for batch in batches_for("mlp", "float32"):
        ours, theirs = here.step(*batch, lr=0.05), child.step(*batch, lr=0.05)
        for name in ("loss", "perturbed_loss", "grad_norm", "perturbation_norm"):
            assert float(getattr(ours, name)) == getattr(theirs, name), name
        assert theirs.finite is True
    state = child.state
    for name, value in here.state.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    child.set_state({name: value * 0 for name, value in state.items()})
    assert not any(value.any() for value in child.state.values())


def test_it_resumes_in_another_process(child: ChildSession, tmp_path: Path) -> None:
    batch = batches_for("mlp", "float32")[0]
    child.step(*batch)
    assert child._process is not None
    before, first = child.state, child._process.pid
    child.resume(tmp_path / "checkpoint")
    assert child._process.pid != first
    for name, value in child.state.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_errors_there_are_errors_here(child: ChildSession) -> None:
    with pytest.raises(SessionError, match="does not match the contract"):
        child.set_state({})
    assert child.state  # it goes on


def test_an_artifact_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="manifest"):
        ChildSession(tmp_path, "cpu", 1, False)


@pytest.mark.parametrize(
    ("end", "words"), [(signal.SIGSEGV, "signal 11 (SIGSEGV)"), (signal.SIGKILL, "signal 9")]
)
def test_a_crash_is_named(child: ChildSession, end: signal.Signals, words: str) -> None:
    assert child._process is not None
    os.kill(child._process.pid, end)
    batch = batches_for("mlp", "float32")[0]
    with pytest.raises(ChildCrash) as raised:
        child.step(*batch)
    assert words in str(raised.value)


def test_a_crash_fails_one_target_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of ``onnx`` gets a signal at its third step, as a segmentation fault would."""
    opened = subjects._opened

    def crashing(folder: Path, *arguments: Any) -> Any:
        session = opened(folder, *arguments)
        if "onnx" in open_target(folder):
            step, count = session.step, iter(range(10**6))

            def third(*batch: Any, **hyper: Any) -> Any:
                if next(count) == 2:
                    os.kill(session._process.pid, signal.SIGSEGV)
                return step(*batch, **hyper)

            session.step = third
        return session

    def open_target(folder: Path) -> str:
        return sx.artifact.folder.open_artifact(folder).target  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(subjects, "_opened", crashing)
    report = sx.check_parity(
        step_of("mlp", "float32"),
        batches_for("mlp", "float32"),
        targets=["onnx", "torchscript"],
        num_steps=4,
    )
    first, second = report.targets
    assert first.error is not None
    assert "free-running step 3: ChildCrash: its process ended with signal 11" in first.error
    assert not first.ok
    assert second.ok, str(report)
    assert not report.ok


def test_what_is_printed_before_our_code_is_an_error_and_not_a_hang(
    folder: Path, tmp_path: Path
) -> None:
    """Standard output is the protocol's; what comes on it before it is taken over is beyond us."""
    (tmp_path / "sitecustomize.py").write_text("print('hello from a library', flush=True)\n")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{before or ''}"
    try:
        with pytest.raises(Exception):  # noqa: B017,PT011
            # Printed before our code runs; that is beyond us, and must be an error, not a hang.
            ChildSession(folder, "cpu", 1, False)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def test_torch_draws_from_the_parents_seed(tmp_path: Path) -> None:
    """A step that draws from torch's own generator draws there what it would draw here."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(12, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 5)
    )
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    semantics = sx.Semantics(generator="torch")
    step = sx.TrainStep(model, torch.nn.CrossEntropyLoss(), sam, semantics=semantics)
    report = sx.check_parity(
        step, batches_for("mlp", "float32"), targets=["torchscript"], num_steps=3
    )
    assert report.ok, str(report)


def test_options_for_cuda_reach_the_child(folder: Path) -> None:
    given = sx.CudaOptions(memory_limit=1 << 20, tf32=True)
    with pytest.raises(SessionError, match=r"memory_limit=1048576, tf32=True.*device='cpu'"):
        ChildSession(folder, "cpu", 1, False, cuda=given)


def test_a_step_that_clips_says_what_it_clipped() -> None:
    """The norm before clipping is one more result, which a session elsewhere has to send."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    semantics = sx.Semantics(clip_norm=0.1)
    step = sx.TrainStep(model, torch.nn.CrossEntropyLoss(), sam, semantics=semantics)
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,)))]
    report = sx.check_parity(step, batches, targets=["torchscript"], num_steps=2)
    assert report.ok, report
    assert any(row.name == "perturbed_grad_norm" for row in report.targets[0].rows)
