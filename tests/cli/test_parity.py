"""``sam-export parity``."""

from __future__ import annotations

import html
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

import sam_export
from sam_export.cli import main
from sam_export.errors import ParityError
from tests.cli.conftest import Workplace


class Report:
    """Stands for a `ParityReport`."""

    def __init__(self, ok: bool) -> None:
        self.ok, self.interrupted = ok, False

    def __str__(self) -> str:
        return f"the report: {self.ok}"

    def to_json(self, path: str) -> None:
        """Writes the verdict."""
        Path(path).write_text(json.dumps({"ok": self.ok}))


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_exit_code_is_the_verdict(
    ok: bool,
    code: int,
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []

    def check(_: Any, batches: Any, **keywords: Any) -> Report:
        calls.append((len(batches), keywords))
        return Report(ok)

    monkeypatch.setitem(vars(sam_export), "check_parity", check)
    out = tmp_path / "report.json"
    argv = ["parity", f"{workplace.recipe}:recipe", "--set", "batches=9", "--targets", " onnx"]
    assert (
        main([*argv, "--steps", "5", "--device", "cuda:1", "--no-cache", "--json", str(out)])
        == code
    )
    assert f"the report: {ok}" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"ok": ok}
    ((count, keywords),) = calls
    assert count == 5
    del keywords["progress"]
    assert shlex.split(keywords.pop("command"))[:3] == ["sam-export", *argv[:2]]
    assert keywords == {
        "targets": ["onnx"],
        "artifacts": {},
        "num_steps": 5,
        "device": "cuda:1",
        "cuda": None,
        "dynamic": "batch",
        "seed": 0,
        "stages": False,
        "cache": None,
    }


def test_could_not_compare(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(*_: Any, **__: Any) -> Report:
        raise ParityError("The oracle cannot run this loss.")

    monkeypatch.setitem(vars(sam_export), "check_parity", check)
    assert main(["parity", f"{workplace.recipe}:recipe", "--targets", "onnx"]) == 2
    assert capsys.readouterr().err.endswith("error: The oracle cannot run this loss.\n")


@pytest.mark.parametrize("targets", ["", ",", "onnx,onnx", "onnx,tensorflow"])
def test_wrong_targets(
    targets: str, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", f"{workplace.recipe}:recipe", "--targets", targets]) == 2
    assert (
        "expected names out of torch-compile, torchscript, aot-inductor, onnx"
        in capsys.readouterr().err
    )


def test_wrong_number_of_steps(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", f"{workplace.recipe}:recipe", "--steps", "0"]) == 2
    assert "--steps 0: at least 1" in capsys.readouterr().err


def test_real_parity_of_the_onnx_target(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--steps", "3"]
    page, note = tmp_path / "a page.html", tmp_path / "note.md"
    more = ["--json", str(out), "--html", str(page), "--markdown", str(note)]
    assert main([*argv, *more]) == 0
    printed = capsys.readouterr().out
    assert "onnx" in printed
    assert all(f"written: {path}" in printed for path in (out, page, note))
    values = json.loads(out.read_text())
    assert shlex.split(values["command"]) == ["sam-export", *argv, *more]
    assert html.escape(values["command"]) in page.read_text()
    assert values["command"] in note.read_text()


LOOP = """
import torch


def right(model, optimizer):
    def step(x, y):
        (group,) = optimizer.param_groups
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
            before = [p.clone() for p in group["params"]]
            for p in group["params"]:
                p.add_(group["rho"] * p.grad / norm)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, old in zip(group["params"], before):
                p.copy_(old)
        optimizer.step()
        return loss

    return step


def plain(model, optimizer):
    def step(x, y):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step
"""


def test_an_artifact_and_a_loop_of_the_users(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loops.py").write_text(LOOP)
    argv = ["parity", f"{workplace.recipe}:recipe", "--artifact", str(workplace.artifact)]
    argv += ["--steps", "3", "--reference"]
    assert main([*argv, f"{tmp_path / 'loops.py'}:right"]) == 0
    out = capsys.readouterr().out
    assert f"{workplace.artifact.name} (CPUExecutionProvider): OK" in out
    assert "your loop: the same step (3 steps" in out
    assert main([*argv, f"{tmp_path / 'loops.py'}:plain"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "there is no perturbation: this is the base optimizer alone" in out


def test_the_cache_is_used(workplace: Workplace, tmp_path: Path) -> None:
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--steps", "1"]
    cache = tmp_path / "cache"
    assert main([*argv, "--cache", str(cache)]) == 0
    (kept,) = cache.iterdir()
    before = (kept / "step.onnx").stat().st_ino
    assert main([*argv, "--cache", str(cache)]) == 0
    assert (kept / "step.onnx").stat().st_ino == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--artifact", "a", "--artifact", "a"], "--artifact is given twice"),
        (["--reference", "nowhere.py:loop"], "nowhere.py does not exist"),
        (["--targets", "onyx"], "expected names out of"),
        (["--self-test"], "--self-test has models of its own"),
        (["--tf32", "--memory-limit", "2G"], "--memory-limit 2G --tf32 with --device cpu"),
        (["--device", "cuda", "--memory-limit", "2X"], "--memory-limit 2X: expected a whole"),
    ],
)
def test_other_requests_are_refused(
    options: list[str], message: str, workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", f"{workplace.recipe}:recipe", *options]) == 2
    assert message in capsys.readouterr().err


def test_options_for_cuda_reach_the_check(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sam_export

    class Stopped(Exception):
        pass

    asked: dict[str, Any] = {}

    def check_parity(*_: Any, **options: Any) -> None:
        asked.update(options, tf32=os.environ.get("NVIDIA_TF32_OVERRIDE"))
        raise Stopped

    monkeypatch.setattr(sam_export, "check_parity", check_parity, raising=False)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # which puts back what was there
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    flags = ["--device", "cuda:1", "--tf32", "--cuda-graph", "--allow-cpu-nodes"]
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", *flags]
    assert main([*argv, "--memory-limit", "1G"]) == 2
    assert asked["device"] == "cuda:1"
    assert asked["cuda"] == sam_export.CudaOptions(1 << 30, True, True, True)
    assert asked["tf32"] is None
    assert main([*argv[:-4], "cuda"]) == 2
    assert asked["cuda"] is None
    assert asked["tf32"] == "0"
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    capsys.readouterr()
    assert main(["parity", "--self-test", "--targets", "onnx", *flags]) == 2
    assert "not --tf32 --cuda-graph --allow-cpu-nodes" in capsys.readouterr().err


def test_ctrl_c_is_not_a_verdict(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sam_export.parity import check

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "run_locked", stop)
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--steps", "2"]
    assert main(argv) == 2
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "interrupted: only what was compared until then is here" in " ".join(out.split())


def wrong_tanh_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the gradient of tanh an ONNX form that is off by half the gradient."""
    import torch

    from sam_export.lower.onnx_ops.table import FORMS

    def wrong(gradient: Any, output: Any) -> Any:
        from onnxscript import opset18 as op

        slope = op.Sub(op.Constant(value_float=1.5), op.Mul(output, output))
        return op.Mul(gradient, slope)

    wrong.__annotations__ = {}
    monkeypatch.setitem(FORMS, torch.ops.aten.tanh_backward.default, wrong)


def test_locate_goes_to_the_failed_targets(
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wrong form fails the check and is then found; the exit code is still the check's.

    The target fails with its stages too, and is searched once.
    """
    from tests.parity.test_locate import reproduced

    wrong_tanh_gradient(monkeypatch)
    out = tmp_path / "found"
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--steps", "2"]
    assert main([*argv, "--stages", "--locate", str(out)]) == 1
    text = capsys.readouterr().out
    assert "onnx, stages (CPUExecutionProvider): FAILED" in text
    assert text.count("the first that differs is tanh_backward") == 1
    assert "not located" not in text
    assert reproduced(str(out / "onnx"))[0] == 1
    assert main([*argv, "--locate", str(out)]) == 2
    assert "there already" in capsys.readouterr().err


def test_locate_says_at_once_that_it_searches_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["parity", "absent.py:recipe", "--targets", "onnx", "--device", "cuda"]
    assert main([*argv, "--locate", str(tmp_path / "found")]) == 2
    text = capsys.readouterr().err
    assert "--locate searches on the CPU" in text
    assert "absent.py" not in text  # no recipe was run before


def test_locate_searches_the_artifact_that_was_given(
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An old artifact with a fault that the exporter no longer makes."""
    from tests.parity.test_locate import reproduced

    recipe, old, out = f"{workplace.recipe}:recipe", tmp_path / "old", tmp_path / "found"
    with monkeypatch.context() as patch:
        wrong_tanh_gradient(patch)
        assert main(["export", recipe, "--out", str(old)]) == 0
    argv = ["parity", recipe, "--targets", "onnx", "--artifact", str(old), "--steps", "2"]
    assert main([*argv, "--locate", str(out)]) == 1
    text = capsys.readouterr().out
    assert "old (CPUExecutionProvider): FAILED" in text
    assert "onnx (CPUExecutionProvider): OK" in text
    assert text.count("the first that differs is tanh_backward") == 1
    assert reproduced(str(out / "old"))[0] == 1


def test_locate_on_an_artifact_that_differs_in_its_stages(
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the whole step wrong, that is searched; with a stage alone, its name is said."""
    recipe, wrong, right = f"{workplace.recipe}:recipe", tmp_path / "wrong", tmp_path / "right"
    export = ["export", recipe, "--staged", "--out"]
    with monkeypatch.context() as patch:
        wrong_tanh_gradient(patch)
        assert main([*export, str(wrong)]) == 0
    assert main([*export, str(right)]) == 0
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (wrong, right)]
    manifests[1]["files"]["ascent.onnx"] = manifests[0]["files"]["ascent.onnx"]
    (right / "manifest.json").write_text(json.dumps(manifests[1]))
    (right / "ascent.onnx").write_bytes((wrong / "ascent.onnx").read_bytes())
    argv = ["parity", recipe, "--artifact", str(wrong), "--artifact", str(right), "--steps", "2"]
    assert main([*argv, "--locate", str(tmp_path / "found")]) == 1
    text = capsys.readouterr().out
    for row, verdict in (
        ("wrong", "FAILED"),
        ("wrong, in stages", "FAILED"),
        ("right", "OK"),
        ("right, in stages", "FAILED"),
    ):
        assert f"\n{row} (CPUExecutionProvider): {verdict}" in f"\n{text}"
    assert text.count("the first that differs is tanh_backward") == 1
    assert "right, in stages: not searched: the step as one graph is equal" in text
    assert [each.name for each in (tmp_path / "found").iterdir()] == ["wrong"]


def test_artifacts_that_share_a_name_are_located_in_folders_of_their_own(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.parity.test_locate import reproduced

    recipe, folders = f"{workplace.recipe}:recipe", [tmp_path / name / "step" for name in "ab"]
    with monkeypatch.context() as patch:
        wrong_tanh_gradient(patch)
        for folder in folders:
            assert main(["export", recipe, "--out", str(folder)]) == 0
    given = [word for folder in folders for word in ("--artifact", str(folder))]
    out = tmp_path / "found"
    assert main(["parity", recipe, *given, "--steps", "2", "--locate", str(out)]) == 1
    assert [reproduced(str(each))[0] for each in sorted(out.iterdir())] == [1, 1]


def test_a_folder_that_is_not_there_is_said_before_the_work(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "no" / "parity.html"
    argv = ["parity", f"{workplace.recipe}:recipe", "--targets", "onnx", "--html", str(path)]
    assert main(argv) == 2
    assert f"{path} cannot be written: its folder does not exist" in capsys.readouterr().err
