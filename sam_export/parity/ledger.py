"""The determinism ledger: everything known that a check's numbers may depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from sam_export._compat.precision import float32_precision
from sam_export.runtime.cuda_options import CudaOptions

PACKAGES = (
    "sam_export",
    "torch",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-training",
    "onnxruntime-training-cpu",
)

_PREFIXES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS",
    "CUDA_VISIBLE_DEVICES",
    "CUDNN_",
    "GOMP_",
    "KMP_",
    "MKL_",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_",
    "ONEDNN_",
    "OPENBLAS_",
    "ORT_",
    "PYTHONHASHSEED",
    "TORCH_ALLOW",
    "TORCH_BLAS",
    "TORCH_CUDNN",
    "TORCHINDUCTOR_",
    "PYTORCH_",
)
"""Environment variables by which BLAS, kernels, threads and compilers are known to be steered."""

_SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL", "AUTH", "URL", "PROXY")

_INSTRUCTIONS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512dq", "avx512bw",
    "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def ledger(
    seed: int,
    step_seed: int,
    device: str,
    sessions: Mapping[str, Mapping[str, Any]],
    cuda: CudaOptions | None = None,
) -> dict[str, Any]:
    """JSON values, by section; what this machine does not tell is null.

    Args:
        seed: Of the check.
        step_seed: Of the step's own generator.
        device: As it was asked for.
        sessions: Target to its provider and facts, as far as its session tells them.
        cuda: The options for a CUDA device that were asked for; None: the defaults.

    Returns:
        ``seeds``, ``threads``, ``versions``, ``hardware``, ``numerics`` (switches of torch and
        whether tiny numbers are kept), ``environment`` (variables that are set and matter) and
        ``targets``.
    """
    return {
        "seeds": {
            "check": seed,
            "step_generator": step_seed,
            "torch_generators_before_step_k": "seed * 1000003 + k, k from 0",
        },
        "threads": {
            "torch": torch.get_num_threads(),
            "torch_interop": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "MKL_NUM_THREADS": os.environ.get("MKL_NUM_THREADS"),
        },
        "versions": versions(),
        "hardware": {
            **_hardware(device),
            "cuda_options": None if cuda is None else cuda.to_dict(),
        },
        "numerics": _numerics(),
        "environment": _environment(),
        "targets": {name: dict(facts) for name, facts in sessions.items()},
    }


def versions() -> dict[str, str]:
    """Version of Python and of each package that the targets are made of, where it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware(device: str) -> dict[str, Any]:
    model, flags = _cpu()
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return {
        "device": device,
        "cpu": model,
        "architecture": platform.machine(),
        "cores_usable": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instruction_sets": [name for name in _INSTRUCTIONS if name in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
    }


def _cpu() -> tuple[str | None, frozenset[str]]:
    """Model and flags, as Linux tells them; elsewhere Python's word for the model and no flags."""
    model: str | None = platform.processor() or None
    flags: set[str] = set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Processor"):
                    model = value.strip()
                elif key.strip().lower() in ("flags", "features"):
                    flags = set(value.split())
                elif not line.strip() and flags:
                    break  # the first core stands for all
    except OSError:
        pass
    return model, frozenset(flags)


def _numerics() -> dict[str, Any]:
    cudnn = torch.backends.cudnn
    return {
        **{f"{name}_float32": rounds for name, rounds in float32_precision().items()},
        "cuda_matmul_allow_fp16_reduced_precision_reduction": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "cuda_matmul_allow_bf16_reduced_precision_reduction": (
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        ),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_enabled": cudnn.enabled,
        "cudnn_deterministic": cudnn.deterministic,
        "cudnn_benchmark": cudnn.benchmark,
        "mkldnn_enabled": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "mkl": torch.backends.mkl.is_available(),
        "torch_keeps_denormals": _keeps_denormals_torch(),
        "numpy_keeps_denormals": _keeps_denormals_numpy(),
    }


def _keeps_denormals_torch() -> bool:
    """Whether half of the smallest normal float32 is not flushed to 0; torch has no getter."""
    tiny = torch.full((1,), float(np.finfo(np.float32).tiny), dtype=torch.float32)
    return bool((tiny * 0.5).item() != 0.0)


def _keeps_denormals_numpy() -> bool:
    tiny = np.full(1, np.finfo(np.float32).tiny, np.float32)
    return bool((tiny * np.float32(0.5)).item() != 0.0)


def _environment() -> dict[str, str]:
    """Variables that matter; one whose name tells that it is secret is left out."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_PREFIXES) and not any(word in name for word in _SECRET)
    }
