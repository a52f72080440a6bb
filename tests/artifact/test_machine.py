"""What compiled code was built for, against what is here."""

from __future__ import annotations

from typing import Any

import pytest

from sam_export.artifact.machine import instruction_set, obstacles, this_machine

X86 = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu vme sse sse2 ssse3 sse4_1 avx2 avx512f fma ibrs md_clear constant_tsc bmi2 hypervisor
processor\t: 1
flags\t\t: fpu
"""
ARM = "processor : 0\nFeatures : fp asimd sve bf16\n"


def test_instruction_sets() -> None:
    assert instruction_set(X86) == (
        *("avx2", "avx512f", "bmi2", "fma", "sse", "sse2", "sse4_1", "ssse3"),
    )
    assert instruction_set(ARM) == ("asimd", "bf16", "fp", "sve")
    assert instruction_set("") == ()


def machine(**changes: Any) -> dict[str, Any]:
    return {
        "system": "Linux",
        "architecture": "x86_64",
        "instruction_set": ["avx2", "fma"],
        "torch": "2.13.0",
        "device": "cpu",
        "cuda_architecture": None,
        **changes,
    }


@pytest.mark.parametrize(
    ("built_for", "line"),
    [
        ({"system": "Darwin"}, "it was built for system Darwin, here is Linux"),
        ({"architecture": "aarch64"}, "it was built for architecture aarch64, here is x86_64"),
        ({"torch": "2.11.0"}, "it was built for torch 2.11.0, here is 2.13.0"),
        ({"device": "cuda"}, "it was built for device cuda, here is cpu"),
        ({"cuda_architecture": "sm_90"}, "built for CUDA architecture sm_90, here is None"),
        ({"instruction_set": ["avx2", "amx_tile", "avx512f"]}, "this CPU lacks amx_tile, avx512f"),
    ],
)
def test_each_difference_is_an_obstacle(built_for: dict[str, Any], line: str) -> None:
    (found,) = obstacles(machine(**built_for), machine())
    assert line in found


def test_a_cpu_that_can_do_more_is_none() -> None:
    assert obstacles(machine(instruction_set=["fma"]), machine()) == []


def test_a_manifest_that_says_nothing_is_refused() -> None:
    assert len(obstacles({}, machine())) == 4


def test_this_machine_fits_itself() -> None:
    here = this_machine("2.13.0+cpu", "cpu", None)
    assert here["torch"] == "2.13.0"
    if here["architecture"] == "x86_64" and here["system"] == "Linux":
        assert "sse2" in here["instruction_set"]
    assert obstacles(here, here) == []
