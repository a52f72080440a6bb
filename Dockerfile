# Two machines use this package, so there are two images, and one that runs the tests:
#
#   docker build --target export -t sam-export:export .   torch (CPU), onnx: captures and exports
#   docker build --target train  -t sam-export:train .    no torch: trains from an ONNX artifact
#   docker build --target test   -t sam-export:test .     scripts/test in a container
#
#   docker run --rm -v "$PWD":/work sam-export:export export models/mlp.py:recipe --out build/mlp
#   docker run --rm -v "$PWD":/work sam-export:train train build/mlp --data train.npz
#
# On Linux, add --user "$(id -u):$(id -g)" so that the files in /work become yours.

ARG PYTHON_VERSION=3.11.13

# ---- The wheel, built once -----------------------------------------------------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS wheel
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt setuptools
COPY pyproject.toml README.md LICENSE ./
COPY sam_export sam_export
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels .

# ---- Training machine: NumPy, safetensors, ONNX Runtime ------------------------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS train
COPY constraints.txt /tmp/
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt \
        "$(echo /wheels/*.whl)[ort-training,cli]" \
    && useradd --create-home --uid 1000 sam
USER 1000
WORKDIR /work
ENTRYPOINT ["sam-export"]
CMD ["--help"]

# ---- Export machine: torch for the CPU, onnx, onnxscript -----------------------------------------
FROM python:${PYTHON_VERSION}-slim-bookworm AS export
# PyTorch's own index has builds without CUDA, a tenth of the size.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir -c /tmp/constraints.txt --extra-index-url "$TORCH_INDEX_URL" \
        torch==2.13.0+cpu
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir -c /tmp/constraints.txt \
        "$(echo /wheels/*.whl)[export,ort-training,cli,report]" scikit-learn \
    && useradd --create-home --uid 1000 sam
USER 1000
WORKDIR /work
ENTRYPOINT ["sam-export"]
CMD ["--help"]

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
