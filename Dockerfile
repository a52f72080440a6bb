# One image for the machine that exports, three for machines that train without torch, one for the tests:
#
#   docker build --target export -t sam-export:export .             torch (CPU), onnx: captures and exports
#   docker build --target train -t sam-export:train .               CPU: onnx, onnx-training, ort-artifacts
#   docker build --target train-ort -t sam-export:cuda13 .          CUDA 13: onnx, by onnxruntime-gpu
#   docker build --target train-ort-training -t sam-export:cuda11 . CUDA 11.8, cuDNN 8: all three targets
#   docker build --target test -t sam-export:test .                 scripts/test in a container
#
#   docker run --rm -v "$PWD":/work sam-export:export export models/mlp.py:recipe --out build/mlp
#   docker run --rm -v "$PWD":/work sam-export:train train build/mlp --data train.npz
#   docker run --rm -v "$PWD/build/mlp":/artifact:ro -v "$PWD":/work sam-export:train train /artifact --data train.npz
#   docker run --rm --gpus all -v "$PWD":/work sam-export:cuda13 train build/mlp --data train.npz --device cuda
#
# On Linux, add --user "$(id -u):$(id -g)" so that the files in /work become yours. The images for CUDA
# need an NVIDIA driver on the host (580 or newer for CUDA 13, 520 for 11.8) and its container toolkit.

ARG PYTHON_VERSION=3.11.13

# ---- The wheel, built once -----------------------------------------------------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY sam_export sam_export
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .

# ---- What all but the tests have: a user, and the command ----------------------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS machine
RUN useradd --create-home --uid 1000 sam && install -d -o sam /work
WORKDIR /work
# A log is read while it is written.
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["sam-export"]
CMD ["--help"]

# ---- Training machine: NumPy, safetensors, ONNX Runtime ------------------------------------------
FROM machine AS train
COPY constraints.txt /tmp/
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt \
        "$(echo /wheels/*.whl)[ort-training,cli]"
USER 1000

# ---- Training machine with a GPU -----------------------------------------------------------------
# CUDA comes from NVIDIA's packages on PyPI, which sam_export finds without a search path: the images
# nvidia/cuda with CUDA 11.8 have Python 3.10 only, and hold much that is not needed here. The large
# packages come first, so that a change of the code does not bring them anew.
FROM machine AS train-ort
COPY constraints.txt constraints-cuda13.txt /tmp/
RUN pip install --no-cache-dir -c /tmp/constraints.txt -r /tmp/constraints-cuda13.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt -c /tmp/constraints-cuda13.txt \
        "$(echo /wheels/*.whl)[ort-gpu,cuda13,cli]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000

FROM machine AS train-ort-training
COPY constraints.txt constraints-cuda11.txt /tmp/
RUN pip install --no-cache-dir -c /tmp/constraints.txt -r /tmp/constraints-cuda11.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt -c /tmp/constraints-cuda11.txt \
        "$(echo /wheels/*.whl)[ort-training-gpu,cuda11,cli]"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000

# ---- Export machine: torch for the CPU, onnx, onnxscript -----------------------------------------
FROM machine AS export
# PyTorch's own index has builds without CUDA, a tenth of the size.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir -c /tmp/constraints.txt --extra-index-url "$TORCH_INDEX_URL" \
        torch==2.13.0+cpu
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt \
        "$(echo /wheels/*.whl)[export,ort-training,cli,report]" scikit-learn
USER 1000

# ---- The tests: the full Python image has the C++ compiler that torch.compile needs --------------
FROM python:${PYTHON_VERSION}-bookworm AS test
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN useradd --create-home --uid 1000 sam && install -d -o sam /repository
USER 1000
WORKDIR /repository
COPY --chown=sam constraints.txt ./
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir -c constraints.txt \
        --extra-index-url "$TORCH_INDEX_URL" torch==2.13.0+cpu
COPY --chown=sam . .
RUN bash -euo pipefail -c "source scripts/setup"
ENTRYPOINT ["scripts/test"]
