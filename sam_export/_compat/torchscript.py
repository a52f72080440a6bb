"""Everything of ``torch.jit``.

torch 2.13 warns that ``torch.jit.script``, ``save`` and ``load`` are deprecated in favour of
`torch.export`, which has no form that libtorch trains from without a compiler. The warnings are
kept from the user, who did not choose the interface; `docs/architecture.md` explains it.
"""

from __future__ import annotations

import contextlib
import io
import math  # noqa: F401  (scripted source finds its names among those of this module)
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SERVING = "serving.py"
"""Name, among a file's extra texts, of the source of a module that only evaluates."""


@contextlib.contextmanager
def _without_deprecation() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        yield


def scripted(module: torch.nn.Module, source: str) -> Any:
    """``module``'s attributes as a `torch.jit.ScriptModule` with the methods of ``source``.

    Args:
        module: Holds submodules, parameters, buffers and attributes, and no code.
        source: TorchScript definitions of methods.

    Raises:
        RuntimeError: The compiler refuses the source; with the line.
    """
    with _without_deprecation():
        # As torch.jit.script does it, but with a type of its own: modules that hold the same
        # attributes would share one, and a method can be defined only once.
        made: Any = torch.jit._recursive.create_script_module(  # type: ignore[no-untyped-call]
            module, lambda _: [], share_types=False
        )
        made.define(source)
    return made


def script_bytes(module: Any, texts: Mapping[str, str] | None = None) -> bytes:
    """A scripted module as ``module.save`` writes it.

    Args:
        module: To be written.
        texts: Kept in the same file, by name; the module does not know of them.
    """
    buffer = io.BytesIO()
    with _without_deprecation():
        torch.jit.save(module, buffer, _extra_files=dict(texts or {}))
    return buffer.getvalue()


def text_in(path: Path, name: str) -> str:
    """A text that was kept beside a scripted module in its file; empty for none.

    Raises:
        RuntimeError: The file is not a scripted module that this torch reads.
    """
    found = {name: ""}
    with _without_deprecation():
        torch.jit.load(str(path), map_location="cpu", _extra_files=found)  # type: ignore[no-untyped-call]
    text: str | bytes = found[name]
    return text.decode() if isinstance(text, bytes) else text


def operators(path: Path, programs: Sequence[str]) -> dict[str, Counter[str]]:
    """How often each operator is called in the methods that run the programs of a file."""
    module = load_scripted(path, torch.device("cpu"))
    counts = {}
    for program in programs:
        graph = getattr(module, f"{program}_unchecked").graph
        nodes = [node for kind in _kinds(graph) for node in graph.findAllNodes(kind)]
        names = (node.kind().removeprefix("aten::") for node in nodes)
        counts[program] = Counter(name for name in names if not name.startswith("__"))
    return counts


def _kinds(graph: Any) -> set[str]:
    return set(re.findall(r"\baten::\w+", str(graph)))


def load_scripted(path: Path, device: torch.device) -> Any:
    """The scripted module of a file, with its tensors on ``device``.

    Raises:
        RuntimeError: The file is not a scripted module that this torch reads.
    """
    with _without_deprecation():
        return torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
