"""Options for CUDA on the command line."""

from __future__ import annotations

import argparse

import pytest

from sam_export.cli.cuda import add_cuda, cuda_arguments, parse_cuda
from sam_export.cli.errors import CommandError
from sam_export.runtime.cuda_options import CudaOptions


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_cuda(parser)
    return parser.parse_args(argv)


def test_nothing_asked_for() -> None:
    assert parse_cuda(parsed()) is None
    assert cuda_arguments(parsed()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("3K", 3072), ("2m", 2 << 20), ("8G", 8 << 30)]
)
def test_memory_limit(text: str, size: int) -> None:
    args = parsed("--memory-limit", text)
    assert parse_cuda(args) == CudaOptions(memory_limit=size)
    assert cuda_arguments(args) == ["--memory-limit", text]


@pytest.mark.parametrize("text", ["0", "-1", "1.5G", "G", "8T", "", "8 G"])
def test_memory_limit_that_cannot_be_read(text: str) -> None:
    with pytest.raises(CommandError, match=r"--memory-limit .*: expected a whole number of bytes"):
        parse_cuda(parsed("--memory-limit", text))


def test_flags() -> None:
    args = parsed("--tf32", "--cuda-graph", "--allow-cpu-nodes")
    assert parse_cuda(args) == CudaOptions(tf32=True, cuda_graph=True, allow_cpu_nodes=True)
    assert cuda_arguments(args) == ["--tf32", "--cuda-graph", "--allow-cpu-nodes"]
    assert parse_cuda(parsed("--cuda-graph")) == CudaOptions(cuda_graph=True)
