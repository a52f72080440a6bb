"""Forms in training operators of ONNX Runtime, where these are exact and measured faster.

`TRAINING` is the portable table with them put over it. Figures in this package are milliseconds of
onnxruntime-training-cpu 1.19.2 at one thread, minima of interleaved repeats, this form against the
portable one. **Not used**, and why:

- ``ReluGrad`` 8.6 against 0.77 (32x64x32x32), ``GeluGrad`` 1.15 against 0.52 (768x512),
  ``FastGeluGrad`` 6.3 against 0.57, ``LogSoftmaxGrad_13`` 0.10 against 0.02 (768x65),
  ``GatherGrad`` 0.45 against 0.05 (768 rows to 65x128): slower.
- ``QuickGeluGrad`` (SiLU) 0.27 against 0.38 alone, but 0.48 against 0.39 with the forward pass,
  which shares its sigmoid with the portable gradient.
- ``ConvGrad``'s input gradient: see `convolution`. ``ConvTransposeGrad``: no CPU kernel.
- ``MaxPoolGrad``, ``AveragePoolGrad``: crash without a declared shape; the second one is wrong
  with a symbolic batch; neither is in the CUDA build.
- ``AdamOptimizer``, ``AdamWOptimizer``: keep the betas and ``1 - beta^t`` in float32; torch, and
  the portable update, keep them in float64 (they differ by 1.3e-5 of the moments).
- ``ReduceAllL2`` 0.086 against 0.106 for all of a small GPT: 0.03 % of its step.
  ``SGDOptimizer`` 0.036 against 0.057 for 262,144 weights: 2 % of an MLP's step, less elsewhere,
  for which the traced update would have to be recognized. ``SoftmaxCrossEntropyLossGrad``: the
  loss is about 0.2 % of a small GPT's step.
- ``IsAllFinite``: no CPU kernel. ``LSTMGrad``, ``GRUGrad``: no CUDA kernel.
"""

from sam_export.lower.onnx_training_ops import (
    activation,
    batch_norm,
    convolution,
    layer_norm,
    pooling,
)
from sam_export.lower.onnx_training_ops.table import (
    TRAINING_FORMS,
    training_tables,
)

TRAINING = training_tables()

__all__ = [
    "TRAINING",
    "TRAINING_FORMS",
    "activation",
    "batch_norm",
    "convolution",
    "layer_norm",
    "pooling",
]
