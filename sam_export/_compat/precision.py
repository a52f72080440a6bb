"""What torch may round float32 to inside an operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def float32_precision() -> dict[str, str]:
    """Library and kind of operator to ``ieee`` or ``none`` (no rounding), ``tf32`` or ``bf16``.

    ``allow_tf32`` and `torch.get_float32_matmul_precision` say the same, but raise once any of
    these settings, which replace them, was made.
    """
    backends = torch.backends
    return {
        "cuda_matmul": backends.cuda.matmul.fp32_precision,
        "cudnn_conv": backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "cudnn_rnn": backends.cudnn.rnn.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn_matmul": backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn_conv": backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "mkldnn_rnn": backends.mkldnn.rnn.fp32_precision,  # type: ignore[attr-defined]
    }


@contextlib.contextmanager
def older_settings_readable() -> Iterator[None]:
    """Lets ``cudnn.allow_tf32`` be read, which raises after ``backends.fp32_precision = ...``.

    `torch.export` reads it on its way through `torch.backends.cudnn`, and uses it for nothing.
    """
    cudnn = torch.backends.cudnn
    try:
        _ = cudnn.allow_tf32
    except RuntimeError:
        kinds = (cudnn.conv, cudnn.rnn)  # type: ignore[attr-defined]
        before = [kind.fp32_precision for kind in kinds]
        # What sets cudnn.allow_tf32, also where torch.testing has forbidden to set it for good.
        torch._C._set_cudnn_allow_tf32(False)
        try:
            yield
        finally:
            for kind, precision in zip(kinds, before, strict=True):
                kind.fp32_precision = precision
    else:
        yield
