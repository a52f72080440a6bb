"""Artifacts of a captured step for the parity check, kept from one check to the next.

What an artifact is made of is in its key: the graphs, contract, semantics, constants and start
state of the captured step, the target and its device, the versions of all packages that shape it,
the sources of this package and, for compiled code, the machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from sam_export.artifact.folder import open_artifact
from sam_export.artifact.machine import instruction_set
from sam_export.errors import ArtifactError
from sam_export.runtime.detect import installed_version
from sam_export.tracing.captured_step import CapturedStep

KEPT = 24
"""Artifacts that are kept at most; those unused for longest go."""

_OURS = re.compile(r"[a-z-]+-[0-9a-f]{32}")
"""Names of the cache's folders: target and key."""

_PACKAGES = ("torch", "onnx", "onnxscript", "onnx-ir", "numpy", "flatbuffers")


def default_cache() -> Path:
    """``$SAM_EXPORT_CACHE``, or ``sam_export`` in the user's cache folder."""
    chosen = os.environ.get("SAM_EXPORT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "sam_export")


def graph_hash(captured: CapturedStep) -> str:
    """SHA-256 of what a captured step computes, and from what: 64 hexadecimal digits."""
    digest = hashlib.sha256()

    def add(text: str) -> None:
        digest.update(text.encode() + b"\0")

    add(json.dumps(captured.contract.to_dict(), sort_keys=True))
    add(json.dumps(captured.semantics.to_dict(), sort_keys=True))
    add(str(captured.portable))
    for name, program in sorted(captured.programs.items()):
        add(name)
        for node in program.graph.nodes:
            add(node.format_node() or "")
        for key, value in sorted(program.constants.items()):
            add(key)
            if isinstance(value, torch.Tensor):
                digest.update(_bytes(value.detach().cpu().numpy()))
    for name, array in sorted(captured.state.items()):
        add(name)
        digest.update(_bytes(np.asarray(array)))
    return digest.hexdigest()


def artifact_for(captured: CapturedStep, target: str, device: str, cache: Path | None) -> Path:
    """Folder of the artifact of a captured step: from the cache, or built and put there.

    Args:
        captured: The step.
        target: Name of the target.
        device: Where it is going to run.
        cache: Folder of the cache; None: a new temporary folder, which is the caller's.

    Raises:
        LoweringError: The target cannot hold the step.
        ArtifactError: It cannot be written.
    """
    from sam_export.api import device_to_build_for, export

    built_for = device_to_build_for(target, device)
    if cache is None:
        folder = Path(tempfile.mkdtemp(prefix="sam_export-parity-"))
        try:
            return export(captured, folder / "step", target=target, device=built_for).path
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    place = cache / f"{target}-{_key(captured, target, built_for)}"
    try:
        open_artifact(place)  # checks every file against its digest
    except ArtifactError:
        shutil.rmtree(place, ignore_errors=True)
    else:
        os.utime(place)
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as temporary:
        made = Path(temporary, "step")
        export(captured, made, target=target, device=built_for)
        try:
            made.rename(place)
        except OSError:  # another check has just put it there
            open_artifact(place)
    _forget_old(cache)
    return place


def _key(captured: CapturedStep, target: str, device: str) -> str:
    parts = [graph_hash(captured), target, device, _sources(), platform.python_version()]
    parts += [f"{name} {installed_version(name)}" for name in _PACKAGES]
    if target == "aot-inductor":
        parts += [platform.machine(), *instruction_set()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _forget_old(cache: Path) -> None:
    """Removes what was not used for longest; a folder of another name is not ours to remove."""
    found = [path for path in cache.iterdir() if _OURS.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _sources() -> str:
    """Digest of this package's own files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    return f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
