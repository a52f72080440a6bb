"""A folder that shows one difference without this package."""

from __future__ import annotations

import io
import os
import platform
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_export._compat.torchscript import script_bytes
from sam_export.artifact.state_file import hidden_sibling
from sam_export.errors import ParityError
from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate_judge import gaps
from sam_export.parity.locate_onnx import OnnxForm
from sam_export.parity.locate_search import Form, Piece
from sam_export.parity.locate_torch import (
    AOT,
    OVERWRITING,
    TorchForm,
    TorchPiece,
    packaged,
    scripted,
)
from sam_export.parity.tolerances import Tolerances
from sam_export.runtime.ort_session import FLOAT32_FUSIONS


@dataclass(frozen=True)
class _Runnable:
    """What is peculiar to a runtime: files, imports, and the code that fills ``found``."""

    files: Mapping[str, bytes]
    imports: str
    code: str
    names: tuple[str, ...]
    inputs: Mapping[str, NDArray[Any]]
    needs: str


def write_reproduction(
    path: str | os.PathLike[str],
    graph: StepGraph,
    form: Form,
    piece: Piece,
    about: str,
    tol: Tolerances,
) -> Path:
    """Writes a piece that differs as a folder that runs with NumPy and the runtime alone.

    ``graph.onnx`` (or ``graph.py``, ``graph.pt``, ``graph.pt2``), ``inputs.npz``, ``expected.npz``
    (float64's values), ``reproduce.py``, which ends with 1 while the difference is there and with 0
    when it is gone, and ``README.md``.

    Args:
        path: The folder; it appears complete or not at all.
        graph: The captured step with eager's values.
        form: The target's form.
        piece: What differs.
        about: What was found, in words.
        tol: The numbers that decided.

    Raises:
        ParityError: The path is there already, or cannot be written.
    """
    final = Path(path)
    if os.path.lexists(final):
        raise ParityError(f"{final} is there already; give a folder that is yet to be made.")
    kind = _onnx(form, piece) if isinstance(form, OnnxForm) else _torch(form, piece)
    found = form.run(piece.wanted, piece.given)
    judge = graph.evaluate(piece.wanted, piece.given, graph.judges_in_double)
    measured = {gap.name: gap for gap in gaps(graph, piece.given, found, tol)}
    expected = {
        name: judge[node].numpy() for name, node in zip(kind.names, piece.wanted, strict=True)
    }
    bounds = {
        name: float(measured[node].bound)
        for name, node in zip(kind.names, piece.wanted, strict=True)
    }
    script = _SCRIPT.format(
        imports=kind.imports, bounds=_lines(bounds), code=kind.code.rstrip(), needs=kind.needs
    )
    files = {
        **kind.files,
        "inputs.npz": _npz(kind.inputs),
        "expected.npz": _npz(expected),
        "reproduce.py": script.encode(),
        "README.md": _readme(about, kind).encode(),
    }
    _write(final, files)
    return final


def _onnx(form: OnnxForm, piece: Piece) -> _Runnable:
    model, inputs = form.piece(piece.wanted, piece.given)
    off = list(FLOAT32_FUSIONS) if form.is_double else []
    return _Runnable(
        files={"graph.onnx": model.SerializeToString(deterministic=True)},
        imports="import onnxruntime as ort",
        code=_ONNX.format(off=off),
        names=tuple(output.name for output in model.graph.output),
        inputs=inputs,
        needs="NumPy and onnxruntime (or onnxruntime-training)",
    )


def _torch(form: Form, piece: Piece) -> _Runnable:
    assert isinstance(form, TorchForm)
    way = form.ways[-1]
    part = form.piece(piece.wanted, piece.given)
    if way == OVERWRITING:
        files = {"graph.pt": script_bytes(scripted(part, way))}
        code = 'run = torch.jit.load(str(HERE / "graph.pt"))\n'
    elif way == AOT:
        files = {"graph.pt2": packaged(part)}
        code = 'run = torch._inductor.aoti_load_package(str(HERE / "graph.pt2"))\n'
    else:
        files = {"graph.py": _source(part).encode()}
        code = f"run = torch.compile(graph.run, backend={way!r}, fullgraph=True)\n"
    imports = "import torch\nimport torch._inductor" if way == AOT else "import torch"
    imports += "\n\nimport graph" if "graph.py" in files else ""
    return _Runnable(
        files=files,
        imports=imports,
        code=code + _TORCH.format(dims=_dims(part)),
        names=piece.wanted,
        inputs={name: value.numpy() for name, value in part.inputs.items()},
        needs=f"NumPy and torch {torch.__version__}",
    )


def _dims(piece: TorchPiece) -> list[tuple[int, int]]:
    """(input, dimension) of every size that varies from call to call in the target."""
    return [(index, d) for index, dims in enumerate(piece.symbolic) for d in dims]


def _source(piece: TorchPiece) -> str:
    """A piece as a Python module with one function, ``run``."""
    made = piece.module.graph.python_code("self")
    header = ["import torch"]
    for name, value in made.globals.items():
        if isinstance(value, ModuleType):
            header.append(f"import {value.__name__} as {name}")
        elif isinstance(value, float):
            header.append(f"{name} = float({str(value)!r})")
        elif value is not None and getattr(value, "__module__", None) not in (None, "builtins"):
            header.append(f"from {value.__module__} import {value.__qualname__} as {name}")
    body = made.src.strip().replace("def forward(self, ", "def run(", 1)
    body = body.replace("def forward(self)", "def run()", 1)
    lines = [line for line in dict.fromkeys(header) if line != "import torch as torch"]
    return "\n".join(lines) + "\n\n\n" + body + "\n"


_SCRIPT = '''\
"""Ends with 1 while the graph beside this file differs from float64, with 0 when it is right.

Needs {needs}.
"""

import pathlib
import sys

import numpy as np
{imports}

BOUNDS = {{
{bounds}
}}
"""Per output, the L2 distance from the expected value that a right runtime may have."""

HERE = pathlib.Path(__file__).resolve().parent
inputs = dict(np.load(HERE / "inputs.npz"))
expected = dict(np.load(HERE / "expected.npz"))
{code}
differs = False
for (name, bound), value in zip(BOUNDS.items(), found):
    right = expected[name].astype(np.float64)
    value = np.asarray(value).astype(np.float64)
    finite = np.isfinite(right)
    same = value.shape == right.shape and np.array_equal(
        value[~finite], right[~finite], equal_nan=True
    )
    gap = np.where(finite, value - right, 0.0) if same else np.full(right.shape, np.inf)
    error = float(np.linalg.norm(gap.ravel()))
    wrong = not error <= bound
    differs |= wrong
    print(f"{{name}}: error {{error:.3g}}, allowed {{bound:.3g}}: {{'DIFFERS' if wrong else 'ok'}}")
    if wrong and gap.size:
        at = np.unravel_index(int(np.argmax(np.abs(gap))), gap.shape)
        where = tuple(int(i) for i in at)
        print(f"  worst element {{where}}: found {{value[at]!r}}, expected {{right[at]!r}}")
sys.exit(1 if differs else 0)
'''

_ONNX = """
options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession(
    str(HERE / "graph.onnx"),
    options,
    providers=["CPUExecutionProvider"],
    disabled_optimizers={off},
)
found = session.run(list(BOUNDS), inputs)
"""

_TORCH = """
tensors = [torch.from_numpy(value) for value in inputs.values()]
for index, dim in {dims}:
    torch._dynamo.maybe_mark_dynamic(tensors[index], dim)
with torch.no_grad():
    found = [value.numpy() for value in run(*tensors)]
"""


def _lines(bounds: Mapping[str, float]) -> str:
    return "\n".join(f"    {name!r}: {bound!r}," for name, bound in bounds.items())


def _readme(about: str, kind: _Runnable) -> str:
    graph = next(iter(kind.files))
    return (
        "# A difference that sam_export found\n\n"
        f"```text\n{about}\n```\n\n"
        f"`python reproduce.py` runs `{graph}` on `inputs.npz`, compares with `expected.npz` (the "
        "same computed in float64 by eager PyTorch) and ends with 1 while it differs, with 0 when "
        f"it does not. It needs {kind.needs}.\n\n"
        f"Written on {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, NumPy {np.__version__}.\n"
    )


def _npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """As ``np.savez`` does it, which cannot have an array called ``file``."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def _write(final: Path, files: Mapping[str, bytes]) -> None:
    partial = hidden_sibling(final.absolute())
    try:
        partial.mkdir(parents=True)
        for name, data in files.items():
            (partial / name).write_bytes(data)
        os.rename(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ParityError(f"The reproduction cannot be written to {final}: {error}.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
