"""Options of commands that load a session on a CUDA device."""

from __future__ import annotations

import argparse

from sam_export.cli.errors import CommandError
from sam_export.runtime.cuda_options import CudaOptions

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_FLAGS = ("tf32", "cuda_graph", "allow_cpu_nodes")


def add_cuda(parser: argparse.ArgumentParser) -> None:
    """Adds the options; see `CudaOptions`."""
    group = parser.add_argument_group(
        "on a CUDA device, for the ONNX targets (--cuda-graph: also for torch-compile)"
    )
    group.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="of ONNX Runtime's memory arena: bytes, or a number with K, M or G; default: none",
    )
    group.add_argument("--tf32", action="store_true", help="allow products in TensorFloat-32")
    group.add_argument(
        "--cuda-graph", action="store_true", help="record a step as a CUDA graph and replay it"
    )
    group.add_argument(
        "--allow-cpu-nodes",
        action="store_true",
        help="start although nodes run on the CPU or a step copies to the host",
    )


def parse_cuda(args: argparse.Namespace) -> CudaOptions | None:
    """What was asked for; None: nothing.

    Raises:
        CommandError: The size cannot be read.
    """
    limit = None if args.memory_limit is None else _bytes(args.memory_limit)
    flags = {name: True for name in _FLAGS if getattr(args, name)}
    if limit is None and not flags:
        return None
    return CudaOptions(memory_limit=limit, **flags)


def cuda_arguments(args: argparse.Namespace) -> list[str]:
    """The options as they were given, for a command that is shown."""
    limit = ["--memory-limit", args.memory_limit] if args.memory_limit else []
    return [*limit, *(f"--{name.replace('_', '-')}" for name in _FLAGS if getattr(args, name))]


def _bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
        raise CommandError(
            f"--memory-limit {text}: expected a whole number of bytes of at least 1, or one with "
            "K, M or G, such as 8G."
        )
    return int(number) * _UNITS[unit]
