"""The machine that compiled code was made for, and whether this one can run it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

# What compilers make use of for this very machine (-march=native); kernel and virtualisation flags
# in the same list come and go without meaning for compiled code.
_FAMILIES = ("sse", "ssse3", "avx", "amx")
_SINGLE = {
    *("abm", "aes", "bmi1", "bmi2", "f16c", "fma", "gfni", "movbe", "pclmulqdq", "popcnt"),
    *("vaes", "vpclmulqdq"),
}


def instruction_set(cpuinfo: str | None = None) -> tuple[str, ...]:
    """The CPU's instruction set extensions, by the names that Linux gives them.

    Args:
        cpuinfo: Text of ``/proc/cpuinfo``; read when None. Empty where there is none.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    for line in cpuinfo.splitlines():
        key, _, values = line.partition(":")
        if key.strip() in ("flags", "Features"):
            arm = key.strip() == "Features"
            return tuple(
                sorted(
                    {
                        flag
                        for flag in values.split()
                        if arm or flag.startswith(_FAMILIES) or flag in _SINGLE
                    }
                )
            )
    return ()


def this_machine(torch_version: str, device: str, cuda_architecture: str | None) -> dict[str, Any]:
    """What compiled code depends on, as JSON values.

    Args:
        torch_version: Version of torch; its build suffix (``+cpu``) is dropped.
        device: ``cpu`` or ``cuda``: what the code runs on.
        cuda_architecture: ``sm_90`` and so on; None on the CPU.
    """
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "instruction_set": list(instruction_set()),
        "torch": torch_version.partition("+")[0],
        "device": device,
        "cuda_architecture": cuda_architecture,
    }


def obstacles(built_for: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Why code built for one machine cannot run on another; empty when it can.

    A CPU with more instruction set extensions than the code was built for is fine.
    """
    lines = [
        f"it was built for {name} {built_for.get(key)}, here is {here[key]}"
        for key, name in (
            ("system", "system"),
            ("architecture", "architecture"),
            ("torch", "torch"),
            ("device", "device"),
            ("cuda_architecture", "CUDA architecture"),
        )
        if built_for.get(key) != here[key]
    ]
    lacking = sorted(set(built_for.get("instruction_set", ())) - set(here["instruction_set"]))
    if lacking:
        lines.append(f"this CPU lacks {', '.join(lacking)}")
    return lines
