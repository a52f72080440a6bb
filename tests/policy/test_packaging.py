"""Extras, pinned versions, images and the CUDA libraries that the package names agree."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from sam_export.runtime.cuda_libraries import package_of

ROOT = Path(__file__).parents[2]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]

# What readelf says that the CUDA provider needs, in onnxruntime-training 1.19.2 and onnxruntime-gpu
# 1.31.1; and cuDNN, which the latter opens later.
LIBRARIES = {
    11: (
        "libcublasLt.so.11", "libcublas.so.11", "libcudnn.so.8", "libcurand.so.10",
        "libcufft.so.10", "libcudart.so.11.0",
    ),
    13: (
        "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13",
        "libcudnn.so.9",
    ),
}  # fmt: skip


def pins(file: str) -> dict[str, str]:
    """Package to exact version."""
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def name_of(requirement: str) -> str:
    return re.split(r"[<>=~;\[ ]", requirement, maxsplit=1)[0]


@pytest.mark.parametrize("cuda", [11, 13])
def test_extra_brings_what_the_provider_needs(cuda: int) -> None:
    assert set(EXTRAS[f"cuda{cuda}"]) == {package_of(name, cuda) for name in LIBRARIES[cuda]}


@pytest.mark.parametrize(("cuda", "runtime"), [(11, "ort-training-gpu"), (13, "ort-gpu")])
def test_pins_of_an_image_cover_its_extras(cuda: int, runtime: str) -> None:
    own = pins(f"constraints-cuda{cuda}.txt")
    common = pins("constraints.txt")
    wanted = [*EXTRAS[f"cuda{cuda}"], *EXTRAS[runtime]]
    assert {name_of(item) for item in wanted} <= set(own)
    assert not set(own) & set(common)
    for item in wanted:
        name, version = name_of(item), own[name_of(item)]
        rest = item[len(name) :]
        if rest.startswith("=="):
            assert version == rest[2:]
        elif rest.startswith("~="):
            major, minor = rest[2:].split(".")
            assert version.split(".")[0] == major, item
            assert int(version.split(".")[1]) >= int(minor), item


def test_every_extra_is_pinned_somewhere() -> None:
    files = ("constraints.txt", "constraints-cuda11.txt", "constraints-cuda13.txt")
    known = {
        name.lower() for file in (*files, "constraints-onnxruntime.txt") for name in pins(file)
    }
    for extra, requirements in EXTRAS.items():
        for item in requirements:
            assert name_of(item).lower() in known, f"{extra}: {item}"


def test_images() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    assert {"export", "train", "train-ort", "train-ort-training", "test"} <= {s for _, s in stages}
    for base, _ in [item for item in stages if item[0] != "machine"]:
        assert base.startswith("python:${PYTHON_VERSION}-"), f"{base} has no pinned tag"
    assert re.search(r"^ARG PYTHON_VERSION=3\.11\.\d+$", text, re.MULTILINE)
    bodies = re.split(r"^FROM \S+ AS ", text, flags=re.MULTILINE)[1:]
    for body in bodies:
        stage = body.split()[0]
        if stage not in ("wheel", "machine"):
            assert re.search(r"^USER 1000$", body, re.MULTILINE), f"{stage} runs as root"
        assert ("torch==" in body) == (stage in ("export", "test")), stage
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", text, re.MULTILINE)
    for file in " ".join(copied).split():
        assert any(line in (f"!{file}", "!constraints*.txt") for line in ignored), file


def test_the_image_of_the_tests_holds_what_they_read() -> None:
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    named = re.compile(r"""(?:ROOT|parents\[\d\])\s*/\s*["']([\w.-]+)["']""")
    found = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in named.findall(path.read_text())
        if (ROOT / name).exists()
    }
    assert {"examples", "models", "docs"} <= found
    for name in sorted(found):
        assert any(fnmatch.fnmatch(f"!{name}", line) for line in kept), name
