"""Options of CUDA sessions: what is refused, what reaches the provider, what is kept in step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import sam_export as sx
from sam_export.runtime.cuda_options import CudaOptions, cuda_options
from sam_export.runtime.detect import require_onnxruntime, require_provider
from sam_export.runtime.ort_values import OrtValues
from sam_export.runtime.torch_engine import Changes
from tests.runtime.target_cases import images, make

ALL = ("memory_limit", "tf32", "cuda_graph", "allow_cpu_nodes")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_limit": 0}, r"memory_limit=0\): expected a number of bytes of at least 1"),
        ({"memory_limit": 1e9}, r"memory_limit=1000000000\.0"),
        ({"memory_limit": True}, r"memory_limit=True"),
        ({"tf32": 1}, r"tf32=1\): expected True or False"),
        ({"cuda_graph": "yes"}, r"cuda_graph='yes'"),
        ({"allow_cpu_nodes": None}, r"allow_cpu_nodes=None"),
    ],
)
def test_wrong_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(sx.SessionError, match=message):
        CudaOptions(**given)


def test_provider_options() -> None:
    assert CudaOptions().provider_options(2) == {
        "device_id": "2",
        "use_tf32": "0",
        "enable_cuda_graph": "0",
    }
    given = CudaOptions(memory_limit=1 << 30, tf32=True, cuda_graph=True)
    assert given.provider_options(0) == {
        "device_id": "0",
        "use_tf32": "1",
        "enable_cuda_graph": "1",
        "gpu_mem_limit": "1073741824",
    }


def test_options_for_another_device_or_target() -> None:
    assert cuda_options(None, "cpu", "onnx", ALL) == CudaOptions()
    assert cuda_options(CudaOptions(tf32=True), "cuda:1", "onnx", ALL).tf32
    with pytest.raises(sx.SessionError, match="given with device='cpu'; these options are for"):
        cuda_options(CudaOptions(), "cpu", "onnx", ALL)
    given = CudaOptions(tf32=True, cuda_graph=True)
    with pytest.raises(sx.SessionError, match=r"cuda_graph\); it takes tf32, allow_cpu_nodes"):
        cuda_options(given, "cuda", "ort-artifacts", ("tf32", "allow_cpu_nodes"))
    with pytest.raises(sx.SessionError, match=r"takes none of these(?s:.*)allow_tf32"):
        cuda_options(CudaOptions(tf32=True), "cuda", "torchscript", ())
    with pytest.raises(
        sx.SessionError, match=r"cuda=\{'tf32': True\}: expected sam_export\.CudaOpt"
    ):
        cuda_options({"tf32": True}, "cuda", "onnx", ALL)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def captured() -> Any:
    return sx.capture(make(torch.float32, "sgd"), images(8, torch.float32))


@pytest.fixture(scope="module")
def for_cuda(captured: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sx.export(captured, tmp_path_factory.mktemp("cuda") / "step", device="cuda").path


def test_load_takes_the_options(for_cuda: Path) -> None:
    with pytest.raises(sx.SessionError, match="given with device='cpu'"):
        sx.load(for_cuda, cuda=CudaOptions(tf32=True))
    if "CUDAExecutionProvider" in require_onnxruntime().get_available_providers():
        pytest.skip("this ONNX Runtime has a CUDA provider")
    with pytest.raises(sx.RuntimeUnavailableError, match="needs CUDAExecutionProvider"):
        sx.load(for_cuda, device="cuda", cuda=CudaOptions(tf32=True))


@pytest.mark.parametrize(
    ("target", "given", "refused"),
    [
        ("torchscript", CudaOptions(cuda_graph=True), r"\(cuda_graph\); it takes none of these"),
        (
            "torch-compile",
            CudaOptions(tf32=True, cuda_graph=True),
            r"\(tf32\); it takes cuda_graph",
        ),
    ],
)
def test_torch_targets_take_few(
    captured: Any, target: str, given: CudaOptions, refused: str
) -> None:
    with pytest.raises(sx.SessionError, match=f"CudaOptions{refused}"):
        sx.load(captured, target=target, device="cuda", cuda=given)
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    taken = CudaOptions(cuda_graph=target == "torch-compile")
    with pytest.raises(sx.RuntimeUnavailableError, match="finds no CUDA device"):
        sx.load(captured, target=target, device="cuda:1", cuda=taken)
    with pytest.raises(sx.RuntimeUnavailableError, match="Unknown device 'gpu'"):
        sx.load(captured, target=target, device="gpu")


def test_a_compiled_artifact_for_another_device() -> None:
    from sam_export.artifact.machine import obstacles, this_machine

    here = this_machine("2.13.0", "cuda", "sm_90")
    assert obstacles({**here, "device": "cpu", "cuda_architecture": None}, here) == [
        "it was built for device cpu, here is cuda",
        "it was built for CUDA architecture None, here is sm_90",
    ]


def test_hyper_parameters_that_changed() -> None:
    changes = Changes()
    first, zero = np.array([0.1, 0.2]), np.array([0.0])
    assert [name for name, _ in changes.of({"lr": first, "rho": zero})] == ["lr", "rho"]
    assert changes.of({"lr": first.copy(), "rho": zero}) == []
    ((name, values),) = changes.of({"lr": np.array([0.1, 0.3]), "rho": zero})
    assert (name, values.tolist()) == ("lr", [0.1, 0.3])
    assert [name for name, _ in changes.of({"rho": -zero})] == ["rho"]


def test_hyper_parameters_reach_values_that_share_no_memory(
    for_cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, where a value is a copy of the array that it was made of."""
    expected, batch = sx.load(for_cuda), images(8, torch.float32)

    def copied(self: OrtValues, array: Any) -> Any:
        self.share_memory = False
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array))

    monkeypatch.setattr(OrtValues, "of", copied)
    session = sx.load(for_cuda)
    for options in ({}, {"lr": 0.5}, {"rho": 0.3}, {}):
        found = session.step(*batch, **options)
        wanted = expected.step(*batch, **options)
        assert float(found.perturbed_loss) == float(wanted.perturbed_loss)
    for name, value in expected.state.items():
        np.testing.assert_array_equal(session.state[name], value)


def test_on_cuda(for_cuda: Path) -> None:
    """The step stays on the device, and is the one that the CPU takes."""
    try:
        require_provider("cuda")
    except sx.RuntimeUnavailableError as error:
        pytest.skip(str(error))
    batch = images(8, torch.float32)
    expected = sx.load(for_cuda)
    for options in (CudaOptions(), CudaOptions(cuda_graph=True, memory_limit=1 << 30)):
        session = sx.load(for_cuda, device="cuda", cuda=options)
        facts = session.facts
        assert facts["placement"]["step"]["findings"] == []
        assert facts["provider_options"]["CUDAExecutionProvider"]["use_tf32"] == "0"
        expected.set_state(session.state)
        for lr in (0.1, 0.1, 0.05):
            found, wanted = session.step(*batch, lr=lr), expected.step(*batch, lr=lr)
            assert float(found.loss) == pytest.approx(float(wanted.loss), rel=1e-5)
