"""`import sam_export` is quick and imports neither torch nor onnx."""

from __future__ import annotations

import subprocess
import sys

BUDGET = 0.3
"""Seconds; the best of several runs, since other work may share the machine."""

RUNS = 5
HEAVY = ("torch", "onnx", "onnxscript", "onnxruntime", "matplotlib", "rich", "sklearn")


def in_new_process(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_import_is_quick() -> None:
    code = (
        "import time; start = time.perf_counter(); import sam_export; "
        "print(time.perf_counter() - start)"
    )
    seconds = [float(in_new_process(code)) for _ in range(RUNS)]
    assert min(seconds) < BUDGET, f"import sam_export took {sorted(seconds)} s"


def test_import_is_lean() -> None:
    code = f"import sys, sam_export; print([n for n in {HEAVY} if n in sys.modules])"
    assert in_new_process(code) == "[]"


def test_help_of_every_command_is_lean() -> None:
    code = (
        "import sys; from sam_export.cli.app import make_parser; make_parser(); "
        f"print([n for n in {HEAVY} if n in sys.modules])"
    )
    assert in_new_process(code) == "[]"


def test_everything_public_is_there() -> None:
    code = "import sam_export as sx; print([n for n in sx.__all__ if getattr(sx, n, 0) == 0])"
    assert in_new_process(code) == "[]"
