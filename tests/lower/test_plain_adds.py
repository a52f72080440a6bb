"""Inductor drops the factor of an addition to a matrix product; our programs have none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_export as sx
from sam_export._compat.inductor import compiled_with
from sam_export.lower.plain_adds import without_factors
from tests.parity.cases import HYPER, batches_for
from tests.parity.cases import MLP as SmallMLP


class Sums(nn.Module):
    """Both orders, a sum of another dtype, and one without a factor."""

    def forward(self, x: Tensor, y: Tensor, b: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        product = x @ y
        return (
            torch.add(product, b, alpha=0.25),
            torch.add(b, x @ y, alpha=0.25),
            torch.add(b, counts, alpha=0.25),
            b + 1.0,
        )


def given() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(3, 8), torch.randn(8, 5), torch.randn(3, 5), torch.arange(5)


def exported() -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.export.export(Sums(), given()).run_decompositions({})


def results(program: torch.export.ExportedProgram) -> Any:
    return compiled_with(program.module(check_guards=False), "inductor")(*given())


def test_compiled_sums_are_right() -> None:
    program = without_factors(exported())
    for found, expected in zip(results(program), Sums()(*given()), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.xfail(strict=True, reason="Inductor drops alpha; passes: remove lower/plain_adds.py")
def test_inductor_keeps_the_factor() -> None:
    for found, expected in zip(results(exported()), Sums()(*given()), strict=True):
        torch.testing.assert_close(found, expected)


def test_only_such_sums_are_changed() -> None:
    before = exported()
    nodes = [node.format_node() for node in before.graph.nodes]
    program = without_factors(before)
    assert [node.format_node() for node in before.graph.nodes] == nodes
    factors = [n.kwargs["alpha"] for n in program.graph.nodes if "alpha" in n.kwargs]
    assert factors == [0.25]  # of whole numbers, which the factor would make floating
    for found, expected in zip(
        program.module(check_guards=False)(*given()), Sums()(*given()), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@pytest.mark.wide
@pytest.mark.parametrize("target", ["torch-compile", "aot-inductor"])
def test_weight_decay_in_both_gradients_of_a_linear_layer(target: str) -> None:
    torch.manual_seed(0)
    model = SmallMLP()
    sam = sx.SAM(model.parameters(), torch.optim.SGD, rho=0.05, **HYPER)
    semantics = sx.Semantics(decay_in_ascent=True, on_nonfinite="ignore")
    step = sx.TrainStep(model, nn.CrossEntropyLoss(), sam, semantics=semantics)
    report = sx.check_parity(step, batches_for("mlp", "float32"), targets=[target], num_steps=4)
    assert report.ok, str(report)
