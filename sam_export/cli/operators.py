"""How often each operator occurs in the programs of an artifact."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sam_export.artifact.folder import Artifact

_IN_ONNX = ("onnx", "onnx-training", "ort-artifacts")
_PACKAGES = {"torchscript": "torch", "torch-compile": "torch"}


def operators_of(artifact: Artifact) -> tuple[dict[str, Counter[str]] | None, str]:
    """Program to its operators, or None and why they are not known."""
    in_onnx = artifact.target in _IN_ONNX
    needed = "onnx" if in_onnx else _PACKAGES.get(artifact.target)
    if needed is None:
        return None, f"an artifact of {artifact.target} holds compiled code"
    if importlib.util.find_spec(needed) is None:
        return None, f"counting them needs the package {needed}: pip install {needed}"
    programs = [program.name for program in artifact.contract.programs]
    if in_onnx:
        return {program: count_onnx(artifact.file(program)) for program in programs}, ""
    if artifact.target == "torchscript":
        from sam_export._compat.torchscript import operators

        return operators(artifact.file("step"), programs), ""
    from sam_export._compat.inductor import operators_of_exported

    return {program: operators_of_exported(artifact.file(program)) for program in programs}, ""


def count_onnx(path: Path) -> Counter[str]:
    """Nodes of an ONNX file by operator, those in subgraphs and local functions included.

    Args:
        path: The file. Operators outside the standard set are named ``domain::Op``.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    counts: Counter[str] = Counter()
    waiting = [list(model.graph.node), *(list(function.node) for function in model.functions)]
    while waiting:
        for node in waiting.pop():
            domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
            counts[domain + node.op_type] += 1
            for attribute in node.attribute:
                waiting += [list(graph.node) for graph in (attribute.g, *attribute.graphs)]
    return counts
