"""The form of the source files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 400
CATCH_ALL = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}

FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("sam_export", "models", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
SHELL = (
    "scripts/setup",
    "scripts/test",
    "scripts/demo",
    "scripts/bench",
    "scripts/test-wide",
    "scripts/test-onnxruntime",
    "scripts/gpu_check",
    "scripts/op_coverage",
    "scripts/third_party_models",
    ".ci/run",
)


def test_files_were_found() -> None:
    assert len(FILES) > 50


@pytest.mark.parametrize("file", FILES)
def test_python_file(file: str) -> None:
    text = (ROOT / file).read_text()
    lines = text.count("\n")
    assert lines <= LONGEST, f"{file} has {lines} lines: split it"
    assert Path(file).stem not in CATCH_ALL, f"{file}: name it for what it does"
    if not text:  # an __init__.py that only makes a package
        return
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{file} does not say what it is for"
    if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body):
        assert "from __future__ import annotations\n" in text, f"{file} lacks that import"


@pytest.mark.parametrize("file", SHELL)
def test_shell_script(file: str) -> None:
    path = ROOT / file
    text = path.read_text()
    if file == "scripts/setup":  # sourced, so that the caller's options hold
        assert "set -" not in text
        return
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert path.stat().st_mode & 0o111 == 0o111, f"{file} is not executable"


PINS = sorted(path.name for path in ROOT.glob("constraints*.txt"))


@pytest.mark.parametrize("file", [*SHELL, "Dockerfile", "pyproject.toml", *PINS])
def test_no_private_registry(file: str) -> None:
    text = (ROOT / file).read_text()
    for word in ("file://", "--find-links", "--trusted-host", "/opt/"):
        assert word not in text, f"{file} holds {word}"
    if file != "Dockerfile":  # there it is PyTorch's own, for the build without CUDA
        assert "index-url" not in text


def test_torch_is_the_first_constraint() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")).startswith("torch==")


@pytest.mark.parametrize("file", PINS)
def test_every_constraint_is_exact(file: str) -> None:
    lines = (ROOT / file).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    for pin in pins:
        name, _, version = pin.partition("==")
        assert name
        assert version
        assert not set(version) & set("*<>~ @"), pin
    assert not [pin for pin in pins if "sam_export" in pin or "sam-export" in pin]
