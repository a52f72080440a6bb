"""Every row of the table of operators, forward and backward, against ATen."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sam_export.errors import LoweringError
from tests.lower.onnx_cases import Case, check, every_dtype, with_gradients
from tests.lower.op_table import TABLE, Row


def case(row: Row, dtype: torch.dtype) -> Case:
    inputs = [value.to(dtype) if value.is_floating_point() else value for value in row.inputs]
    return with_gradients(row.call), inputs


def rows(group: str, dtype: torch.dtype, gaps: bool) -> list[Row]:
    return [row for row in TABLE[group] if dtype in row.dtypes and bool(row.gap) == gaps]


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:The reduce argument of torch.scatter")
@every_dtype
@pytest.mark.parametrize("group", TABLE)
def test_rows(group: str, dtype: torch.dtype) -> None:
    """One graph a group: an export costs a second, an operator little."""
    own = rows(group, dtype, gaps=False)
    tolerances = {row.op: row.tolerance[dtype] for row in own}
    check(tolerances, **{row.op: case(row, dtype) for row in own})


@pytest.mark.xfail(strict=True, raises=(AssertionError, LoweringError))
@pytest.mark.parametrize(
    "row", [row for own in TABLE.values() for row in own if row.gap], ids=lambda row: row.op
)
def test_gaps(row: Row) -> None:
    check(row=case(row, row.dtypes[0]))


def test_a_wrong_gradient_is_found() -> None:
    def call(x: Tensor) -> Tensor:
        factor = 2.0 if get_proxy_mode() is not None else 2.001  # traced, and as expected
        return factor * x + (2.0 - factor) * x.detach()

    with pytest.raises(AssertionError, match="output 1"):
        check(row=(with_gradients(call), [torch.linspace(-1, 1, 5)]))


def test_the_table_is_well_formed() -> None:
    """No two rows of one name; another tolerance has a reason, and so has a gap."""
    names = Counter((group, row.op) for group, own in TABLE.items() for row in own)
    assert [name for name, count in names.items() if count > 1] == []
    for row in (row for own in TABLE.values() for row in own):
        assert bool(row.why) == (row.tolerance is not Row("", len, []).tolerance), row.op
