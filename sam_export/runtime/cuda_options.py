"""What can be chosen for ``device="cuda"``; one dataclass for all targets that take it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sam_export.errors import SessionError


@dataclass(frozen=True)
class CudaOptions:
    """Options of a session on a CUDA device, as `sam_export.load` takes them.

    Attributes:
        memory_limit: Bytes that ONNX Runtime's memory arena may take on the device; None: all. What
            lies outside the arena (cuDNN's and cuBLAS' own memory, the state and the batches)
            comes on top of it.
        tf32: Whether matrix products and convolutions in float32 may round their operands to
            TensorFloat-32 (10 bits of mantissa instead of 23). Faster, and no longer equal to
            eager PyTorch to float32's rounding.
        cuda_graph: Whether a step is recorded as a CUDA graph at its first run and replayed from
            then on, which saves the launch of each kernel. A batch is then copied into a fixed
            place, and each new batch size is recorded anew. With the ONNX targets a result must be
            read before the next step (reading it later raises `SessionError`); ``torch-compile``
            copies its results out of their fixed places. No other target takes it.
        allow_cpu_nodes: Whether a session may start although nodes run on the CPU, or copies
            between the CPU and the device are part of a step; see `runtime.placement`.

    Raises:
        SessionError: A value of another type, or a limit below 1.
    """

    memory_limit: int | None = None
    tf32: bool = False
    cuda_graph: bool = False
    allow_cpu_nodes: bool = False

    def __post_init__(self) -> None:
        limit = self.memory_limit
        if limit is not None and (type(limit) is not int or limit < 1):
            raise SessionError(
                f"CudaOptions(memory_limit={limit!r}): expected a number of bytes of at least 1, "
                "or None for no limit."
            )
        for name in ("tf32", "cuda_graph", "allow_cpu_nodes"):
            if type(getattr(self, name)) is not bool:
                raise SessionError(
                    f"CudaOptions({name}={getattr(self, name)!r}): expected True or False."
                )

    def provider_options(self, index: int) -> dict[str, str]:
        """The options of ONNX Runtime's ``CUDAExecutionProvider``, as it wants them: texts.

        Args:
            index: Number of the device.
        """
        options = {
            "device_id": str(index),
            "use_tf32": str(int(self.tf32)),
            "enable_cuda_graph": str(int(self.cuda_graph)),
        }
        if self.memory_limit is not None:
            options["gpu_mem_limit"] = str(self.memory_limit)
        return options

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def cuda_options(
    given: CudaOptions | None, device: str, target: str, takes: tuple[str, ...]
) -> CudaOptions:
    """The options of a session, after checking that they apply to its device and target.

    Args:
        given: What `load` got; None: the defaults.
        device: The device of the session.
        target: Name of the target.
        takes: Names of the fields that the target's engine can follow.

    Raises:
        SessionError: No options, options for another device than CUDA, or one that the target
            cannot follow.
    """
    if given is None:
        return CudaOptions()
    if not isinstance(given, CudaOptions):
        raise SessionError(
            f"cuda={given!r}: expected sam_export.CudaOptions, as in "
            "cuda=CudaOptions(cuda_graph=True)."
        )
    if not device.startswith("cuda"):
        raise SessionError(
            f"{given} was given with device={device!r}; these options are for device='cuda'. Leave "
            "them out, or load on a CUDA device."
        )
    changed = [field.name for field in fields(given) if getattr(given, field.name) != field.default]
    refused = [name for name in changed if name not in takes]
    if refused:
        raise SessionError(
            f"Target {target!r} cannot follow CudaOptions({', '.join(refused)}); it takes "
            f"{', '.join(takes) or 'none of these options'}. {_WHY.get(target, _TORCH)}"
        )
    return given


_TORCH = (
    "It runs with torch, whose own settings hold for the whole process: "
    "torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, "
    "torch.cuda.set_per_process_memory_fraction."
)
_WHY = {
    "ort-artifacts": "The stock training API passes no provider options on. Use target "
    "'onnx-training', or 'onnx'."
}
