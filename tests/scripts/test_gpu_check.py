"""`scripts/gpu_check`: what it concludes from made-up numbers, and its whole way on the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from sam_export.runtime import cuda_libraries
from scripts import gpu_check
from scripts.bench_cases import CASES
from scripts.bench_child import Meter, run_steps
from scripts.bench_contestants import CONTESTANTS
from scripts.bench_records import Record, Round
from scripts.bench_table import markdown_table
from scripts.gpu_record import Section, page
from scripts.gpu_verdicts import (
    LARGE,
    LAUNCH_BOUND,
    Parity,
    Verdict,
    parity_verdicts,
    same_work,
    speed_verdicts,
)
from scripts.gpu_waits import STEP, counted, waits


def record(
    name: str, step_ms: float, peak: int = 100, waits: dict[str, float] | None = None
) -> Record:
    # The process waits for the device, so it takes hardly any CPU time.
    rounds = [Round(10, 99.0, 0.01, step_ms / 100)] * 3
    return Record(name, 1, rounds=rounds, peak=peak, waits=waits)


def words(verdicts: list[Verdict]) -> dict[str, str]:
    return {verdict.what: verdict.word for verdict in verdicts}


def test_a_round_on_a_gpu_counts_by_its_events() -> None:
    made = record("torch-compile", 2.5)
    assert made.counted == made.rounds
    assert made.step_ms == pytest.approx(2.5)


@pytest.mark.parametrize(("ours", "word"), [(2.0, "yes"), (2.01, "NO")])
def test_launch_bound_models_are_to_be_one_and_a_half_times_as_fast(ours: float, word: str) -> None:
    records = [record("eager-sam", 3.0), record("torch-compile-graph", ours)]
    found = words(speed_verdicts({"mlp": [*records, record("torch-compile", 9.0)]}, "cuda"))
    assert found["torch-compile-graph against eager-sam, mlp"] == word
    assert found["torch-compile-graph against eager-sam, vit"] == "not judged"


@pytest.mark.parametrize(("ours", "word"), [(21.0, "yes"), (21.1, "NO")])
def test_the_large_model_is_compared_with_its_base_step(ours: float, word: str) -> None:
    cases = {LARGE: [record("compiled-base", 10.0), record("torch-compile", ours)]}
    found = words(speed_verdicts(cases, "cuda:1"))
    assert found[f"torch-compile against compiled-base, {LARGE}"] == word


def test_memory_and_waits() -> None:
    cases = {
        "mlp": [
            record("eager-sam", 3.0, peak=100),
            record("torchscript", 3.0, peak=101, waits={}),
            record("aot-inductor", 3.0, peak=100, waits={"cudaStreamSynchronize": 1.0}),
            record("onnx", 3.0, peak=0),
        ]
    }
    verdicts = speed_verdicts(cases, "cuda")
    found = words(verdicts)
    assert found["peak memory of torchscript, mlp"] == "NO"
    assert found["peak memory of aot-inductor, mlp"] == "yes"
    assert found["peak memory of onnx, mlp"] == "not judged"
    ask = "calls in a step of {} that wait for the device, mlp"
    assert found[ask.format("torchscript")] == "yes"
    assert found[ask.format("aot-inductor")] == "NO"
    assert ask.format("onnx") not in found
    (waiting,) = [v for v in verdicts if v.what == ask.format("aot-inductor")]
    assert waiting.found == "cudaStreamSynchronize 1 times"


def test_a_contestant_that_failed_or_was_not_looked_at_is_not_judged() -> None:
    failed = record("torch-compile", 1.0, waits={})
    failed.error = "ChildFailed: gone"
    cases = {"mlp": [record("eager-sam", 3.0), failed, record("torchscript", 1.0)]}
    verdicts = [v for v in speed_verdicts(cases, "cuda") if v.what.endswith(", mlp")]
    assert len(verdicts) == 5
    judged = [v.what for v in verdicts if v.word != "not judged"]
    assert judged == ["peak memory of torchscript, mlp"]
    assert "ChildFailed: gone" in {v.found for v in verdicts}


def test_figures_for_a_gpu_are_not_judged_on_the_cpu() -> None:
    cases = {
        "mlp": [
            record("eager-sam", 3.0),
            record("torch-compile", 9.0, peak=900, waits={"aten::_local_scalar_dense": 1.0}),
        ]
    }
    for verdict in speed_verdicts(cases, "cpu"):
        assert verdict.word == "not judged", verdict
    assert any("(on the CPU)" in verdict.found for verdict in speed_verdicts(cases, "cpu"))


def test_parity_is_judged_by_target() -> None:
    verdicts = parity_verdicts(
        [
            Parity("mlp", "torchscript", True, "1e-7"),
            Parity("vit", "torchscript", False, "w (lock-step)"),
            Parity("mlp", "onnx", None, "no onnxruntime-gpu"),
            Parity("mlp", "torch-compile", True, "1e-7"),
        ]
    )
    assert [(v.what, v.word) for v in verdicts] == [
        ("parity of torchscript", "NO"),
        ("parity of onnx", "not judged"),
        ("parity of torch-compile", "yes"),
    ]
    assert verdicts[0].found == "vit: w (lock-step)"
    assert verdicts[1].found == "no onnxruntime-gpu"


def test_a_contestant_that_trains_otherwise_is_found() -> None:
    assert same_work("mlp", []).word == "yes"
    found = same_work("mlp", ["onnx: first losses [1.0], eager-sam has [2.0]"])
    assert (found.word, found.found) == ("NO", "onnx: first losses [1.0], eager-sam has [2.0]")


def test_memory_that_is_not_known_is_no_zero() -> None:
    table = markdown_table([record("eager-sam", 3.0), record("onnx", 3.0, peak=0)], "eager-sam")
    assert "| onnx | 3.000 | 3.000–3.000 | 1.00 | 3/3 | – | – | – | – | 0 |" in table


def test_only_calls_inside_a_step_count() -> None:
    events = [
        (STEP, 10.0, 20.0),
        (STEP, 30.0, 40.0),
        ("cudaStreamSynchronize", 12.0, 13.0),
        ("cudaStreamSynchronize", 25.0, 26.0),  # between steps: reading the loss
        ("cudaMemcpyAsync", 14.0, 15.0),
        ("aten::_local_scalar_dense", 31.0, 32.0),
        ("aten::_local_scalar_dense", 33.0, 34.0),
    ]
    assert counted(events, 2) == {"aten::_local_scalar_dense": 1.0, "cudaStreamSynchronize": 0.5}
    with pytest.raises(ValueError, match="2 of 3 steps"):
        counted(events, 3)


def test_the_profiler_sees_a_step_that_waits() -> None:
    batches = itertools.cycle([(torch.ones(3), torch.ones(3))])

    def quiet(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def waiting(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x + y).sum())

    assert waits(quiet, batches, 3, "cpu") == {}
    assert waits(waiting, batches, 3, "cpu") == {"aten::_local_scalar_dense": 1.0}


def test_without_a_gpu_it_reports_the_libraries_and_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_libraries, "DRIVER", "libcuda_of_another_planet.so.1")
    assert gpu_check.main([]) == 2
    shown = capsys.readouterr()
    assert "GPUs: none (there is no NVIDIA driver" in shown.out
    assert f"torch: {torch.__version__}" in shown.out
    assert "pip install onnxruntime-gpu" in shown.out
    assert "nvidia-cudnn-cu11~=8.9" in shown.out
    assert "error: no NVIDIA GPU can be used here: there is no NVIDIA driver" in shown.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_targets_that_cannot_run_are_listed_with_the_reason() -> None:
    absent = gpu_check.absent_targets(["torchscript", "onnx"], "cuda")
    assert list(absent) == ["onnx"]
    assert "CUDAExecutionProvider" in absent["onnx"] or "is missing" in absent["onnx"]


def test_the_whole_way_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "EAGER", ("eager-sam",))
    monkeypatch.setattr("scripts.bench.WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr("scripts.bench.ROUND_SECONDS", 0.01)
    out = tmp_path / "record.md"
    chosen = ["--targets", "torchscript", "--parity-models", "mlp", "--bench-models", "mlp"]
    options = ["--device", "cpu", "--steps", "2", "--rounds", "1", "--out", str(out)]
    assert gpu_check.main([*options, *chosen]) == 0, capsys.readouterr().err
    text = out.read_text()
    assert "a trial on the CPU, which says nothing about a GPU" in text
    assert (
        "| parity of torchscript | every model equal to eager | 1 of 1 models equal | yes |" in text
    )
    assert "(on the CPU) | not judged |" in text
    assert "### mlp" in text
    for name in ("eager-sam", "torchscript"):
        assert f"\n| {name} | " in text
    # A scripted step asks whether it is finite, which on a GPU would be a wait.
    assert "| none | aten::_local_scalar_dense 1 times (on the CPU) | not judged |" in text
    assert "time by the wall clock" in text


def test_what_is_known_is_written_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lent machine may be gone in the middle; and a check that crashes is a row, too."""
    import sam_export

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(sam_export, "check_parity", crash, raising=False)
    monkeypatch.setattr(gpu_check, "run_case", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    out = tmp_path / "record.md"
    chosen = ["--targets", "torchscript", "--parity-models", "mlp", "--bench-models", "mlp"]
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--device", "cpu", "--out", str(out), *chosen])
    assert "the check itself failed: RuntimeError: CUDA out of memory" in out.read_text()


def test_each_run_of_a_day_has_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "docs" / "benchmarks").mkdir(parents=True)
    names = []
    for _ in range(3):
        path = gpu_check.unused_record("cuda:0")
        path.write_text("")
        names.append(path.name.partition("gpu-check-")[2])
    assert names == ["cuda.md", "cuda-2.md", "cuda-3.md"]


def test_its_cases_are_there() -> None:
    for name in (*gpu_check.PARITY_CASES, *gpu_check.BENCH_CASES, *LAUNCH_BOUND, LARGE):
        assert not CASES[name].draws
    depths = CASES[LARGE].model()
    assert sum(isinstance(m, torch.nn.Conv2d) for m in depths.modules()) == 28


class Event:
    """Stands for `torch.cuda.Event`: the device's clock, in milliseconds."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time = self.waited_for = -1.0

    def record(self) -> None:
        Event.clock += 40.0
        self.time = Event.clock

    def synchronize(self) -> None:
        self.waited_for = self.time

    def elapsed_time(self, end: Event) -> float:
        assert end.waited_for == end.time
        return end.time - self.time


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_on_cuda_time_is_by_events_and_memory_is_the_allocators(
    device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against stand-ins for `torch.cuda`; on a GPU it has not run."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    meter = Meter(device, CONTESTANTS["torch-compile"])
    batches = itertools.cycle([(1.0, 2.0)])
    timed = run_steps(lambda x, y: x + y, batches, 3, meter)
    assert timed["device_s"] == pytest.approx(0.04)
    assert timed["loss"] == 3.0
    meter.forget_peak()
    assert (meter.resident(), meter.peak()) == (5, 7)
    assert calls == [index, "empty", "reset"]


def test_without_torch_a_gpu_is_timed_by_the_wall_clock() -> None:
    meter = Meter("cuda", CONTESTANTS["onnx"])
    timed = run_steps(lambda x, y: x + y, itertools.cycle([(1.0, 2.0)]), 3, meter)
    assert 0 < timed["device_s"] <= timed["wall_s"]
    assert (meter.resident(), meter.peak()) == (0, 0)


def test_the_record_of_a_gpu_says_so() -> None:
    section = Section("mlp", "an MLP", [record("eager-sam", 3.0)])
    parity = [Parity("mlp", "onnx", None, "no onnxruntime-gpu")]
    text = page("cuda", ["GPUs: A"], parity, 5, [section], 30, [], {"onnx": "no onnxruntime-gpu"})
    assert "device cuda\n" in text
    absent = "- Not run, `onnx`: no onnxruntime-gpu"
    for words in ("time by CUDA events", "torch's allocator", absent):
        assert words in text
    assert "| mlp | onnx | not run | no onnxruntime-gpu |" in text


def test_recorded_steps_are_compared_as_targets_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sam_export

    asked = []

    def check_parity(*_: object, **options: object) -> None:
        asked.append(options["cuda"])
        raise sam_export.ParityError("no")

    monkeypatch.setattr(sam_export, "check_parity", check_parity, raising=False)
    for recorded, name in ((False, "onnx"), (True, "onnx, CUDA graph")):
        (row,) = gpu_check.check_case(CASES["mlp"], ["onnx"], 1, "cpu", recorded)
        assert (row.target, row.ok) == (name, False)
    assert asked == [None, sam_export.CudaOptions(cuda_graph=True)]
