"""Batches and hyper-parameters against the contract: what passes, and what each refusal says."""

from __future__ import annotations

import math
import re
import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sam_export.artifact.contract import StepContract, TensorSpec
from sam_export.artifact.result import DeviceValue
from sam_export.errors import SessionError
from sam_export.runtime.batches import checked_batch, merged_hyper
from tests.artifact.toy import example_batch, make_contract

X, Y = example_batch()
PLAIN = make_contract()
DICT = make_contract(batch_kind="dict")
NORMALIZED = make_contract(dims={"batch": 2})


def check(*given: Any, contract: StepContract = PLAIN, program: str = "step") -> list[Any]:
    return checked_batch(given, contract, contract.program(program))


# -- what passes ----------------------------------------------------------------------------------


def test_tensors_pass_as_the_objects_that_they_are() -> None:
    for given in [(X, Y), (torch.tensor(X), torch.tensor(Y)), (X, torch.tensor(Y))]:
        for found in (check(*given), check(given), check(list(given))):
            assert [id(item) for item in found] == [id(item) for item in given]
    found = check({"target": Y, "x": X}, contract=DICT)
    assert [id(item) for item in found] == [id(X), id(Y)]


def test_views_gradients_and_memory_maps_pass() -> None:
    wide = np.zeros((3, 8), np.float32)
    check(wide.T[::2], np.zeros((4, 1), np.float32)[::-1])
    check(torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 1).expand(4, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 257])
def test_any_batch_size_passes(size: int) -> None:
    check(*example_batch(size))


def test_a_single_example_can_be_evaluated_where_it_cannot_be_trained_on() -> None:
    x, y = example_batch(1)
    check(x, contract=NORMALIZED, program="evaluate")
    check(x, y, contract=NORMALIZED, program="evaluate_loss")
    with pytest.raises(SessionError, match="Batch normalization"):
        check(x, y, contract=NORMALIZED)


def test_a_dict_may_hold_what_the_program_does_not_read() -> None:
    assert check({"x": X, "target": Y}, contract=DICT, program="evaluate")[0] is X
    assert check({"x": X}, contract=DICT, program="evaluate")[0] is X


def test_a_large_batch_is_not_copied() -> None:
    contract = make_contract()
    x, y = np.zeros((200_000, 3), np.float32), np.zeros((200_000, 1), np.float32)
    check(x, y)
    tracemalloc.start()
    try:
        check(x, y, contract=contract)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000


# -- what does not --------------------------------------------------------------------------------

BAD = {
    "nothing": ((), "step takes 2 tensors, x float32[batch, 3], target float32[batch, 1]; it was "
                    "given no batch."),
    "too few": ((X,), "it was given 1 tensors."),
    "too many": ((X, Y, Y), "it was given 3 tensors."),
    "too many in a tuple": (((X, Y, Y),), "it was given 3 tensors."),
    "a dict": (({"x": X, "target": Y},), "step was given a dict; this step was captured with "
                                         "batches that are tuples."),
    "a list of numbers": ((X.tolist(), Y), "Batch tensor 'x' is a list; expected a NumPy array, a "
                                           "torch tensor or an OrtValue, float32[batch, 3]. "
                                           "Convert it: "
                                           "numpy.asarray(value, dtype='float32')."),
    "None": ((X, None), "Batch tensor 'target' is a NoneType"),
    "a number": ((X, 3.0), "Batch tensor 'target' is a float"),
    "a NumPy number": ((X, np.float32(3)), "Batch tensor 'target' is a float32; expected a NumPy"),
    "a result": ((DeviceValue(X, np.asarray), Y), "Batch tensor 'x' is a DeviceValue"),
    "text": (("batch.npz", Y), "Batch tensor 'x' is a str"),
    "masked": ((np.ma.masked_array(X), Y), "'x' is masked or sparse; expected a dense one"),
    "sparse": ((torch.tensor(X).to_sparse(), Y), "'x' is masked or sparse; expected a dense one"),
    "float64": ((X.astype(np.float64), Y), "Batch tensor 'x' has dtype float64; expected float32. "
                                           "Cast it: x.astype('float32')."),
    "float64 in torch": ((torch.tensor(X).double(), Y), "'x' has dtype float64; expected float32. "
                                                        "Cast it: x.to(torch.float32)."),
    "bfloat16": ((torch.tensor(X).bfloat16(), Y), "has dtype bfloat16; expected float32"),
    "labels": ((X, np.zeros((4, 1), np.int64)), "'target' has dtype int64; expected float32."),
    "foreign bytes": ((X.astype(">f4"), Y), "'x' has dtype >f4; expected float32."),
    "objects": ((X.astype(object), Y), "'x' has dtype object; expected float32."),
    "rank": ((X[0], Y), "'x' has shape [3], 1 dimensions; expected 2: float32[batch, 3]."),
    "no dimensions": ((np.zeros((), np.float32), Y), "'x' has shape [], 0 dimensions; expected 2"),
    "fixed size": ((X[:, :2], Y), "'x' has shape [4, 2]; expected float32[batch, 3]: dimension 1 "
                                  "is 2 and must be 3."),
    "broadcast": ((X, Y[:1]), "The batch has two sizes for 'batch': 4 in dimension 0 of 'x', 1 in "
                              "dimension 0 of 'target'. They must be equal."),
    "torch sizes": ((torch.zeros(4, 3), torch.zeros(5, 1)), "two sizes for 'batch': 4 in"),
    "empty": ((X[:0], Y[:0]), "The batch is empty: dimension 0 of 'x' ('batch') is 0; this step "
                              "needs at least 1."),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_refused(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(SessionError, match=re.escape(message)):
        check(*given)


def test_sizes_below_the_smallest_have_their_own_messages() -> None:
    with pytest.raises(SessionError, match="The batch is empty: .* needs at least 2"):
        check(X[:0], Y[:0], contract=NORMALIZED)
    with pytest.raises(
        SessionError, match=r"Size 1 in dimension 0 of 'x' .* at least 2\. Batch no"
    ):
        check(X[:1], Y[:1], contract=NORMALIZED)
    with pytest.raises(SessionError, match="Size 2 in dimension 0 of 'x' .* at least 3"):
        check(X[:2], Y[:2], contract=make_contract(dims={"batch": 3}))
    with pytest.raises(SessionError, match="The batch is empty"):
        check(X[:0], program="evaluate")
    check(X[:2], Y[:2], contract=NORMALIZED)


def test_two_symbolic_sizes_are_independent() -> None:
    contract = make_contract(
        batch=(
            TensorSpec("x", "input", "float32", ("batch", "time", 3)),
            TensorSpec("target", "target", "float32", ("batch", "time")),
        ),
        dims={"batch": 1, "time": 2},
    )
    check(np.zeros((5, 2, 3), np.float32), np.zeros((5, 2), np.float32), contract=contract)
    with pytest.raises(SessionError, match=r"two sizes for 'time': 7 in dimension 1 of 'x', 5 in"):
        check(np.zeros((5, 7, 3), np.float32), np.zeros((5, 5), np.float32), contract=contract)
    with pytest.raises(SessionError, match=r"Size 1 in dimension 1 of 'x' \('time'\)"):
        check(np.zeros((5, 1, 3), np.float32), np.zeros((5, 1), np.float32), contract=contract)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "step takes one dict with x float32[batch, 3], target float32[batch, 1], since"),
        ((X, Y), "it was given ndarray, ndarray."),
        (({"x": X},), "The batch of step lacks target; it has x."),
        (({},), "The batch of step lacks x, target; it has no entries."),
        (({"x": X, "targets": Y},), "an entry 'targets' that this step does not know; it takes x"),
        (({"x": X, "targets": Y},), "Did you mean 'target'?"),
        (({"x": X, "target": Y, 3: Y},), "an entry 3 that this step does not know"),
        (({"x": Y, "target": X},), "dimension 1 is 1 and must be 3"),
    ],
)
def test_a_bad_dict_is_refused(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SessionError, match=re.escape(message)):
        check(*given, contract=DICT)


# -- hyper-parameters -----------------------------------------------------------------------------

GROUPS = make_contract(groups=(("weight",), ("bias",)))
CURRENT = {"lr": (0.1, 0.2), "rho": (0.05, 0.05)}


def merged(**given: Any) -> dict[str, tuple[float, ...]]:
    return merged_hyper(CURRENT, given, GROUPS)


@pytest.mark.parametrize(
    "value",
    [
        *(0.5, [0.5, 0.5], (0.5, 0.5), np.float32(0.5), np.array(0.5), np.array([0.5, 0.5])),
        *(torch.tensor(0.5), torch.tensor([0.5, 0.5]), Fraction(1, 2)),
        *(torch.tensor(0.5, requires_grad=True), [np.float64(0.5), Fraction(1, 2)]),
    ],
)
def test_a_number_or_one_for_each_group_is_taken(value: Any) -> None:
    assert merged(lr=value) == {"lr": (0.5, 0.5), "rho": (0.05, 0.05)}
    assert all(type(number) is float for number in merged(lr=value)["lr"])
    assert CURRENT["lr"] == (0.1, 0.2)


def test_groups_keep_their_own_values_and_zero_is_a_value() -> None:
    assert merged(rho=[0, 1], lr=0) == {"lr": (0.0, 0.0), "rho": (0.0, 1.0)}
    assert merged() == CURRENT


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"lrr": 0.1},
            "Unknown hyper-parameter 'lrr'; this step takes lr, rho. Did you mean 'lr'?",
        ),
        ({"momentum": 0.9}, "What is not listed is fixed in the graph: export the step again"),
        ({"x": X}, "'x' is a tensor of the batch, not a hyper-parameter: pass it by position."),
        ({"lr": [0.1]}, "lr=[0.1] has 1 values; this step has 2 parameter groups."),
        ({"lr": [0.1] * 3}, "has 3 values; this step has 2 parameter groups."),
        ({"lr": []}, "lr=[] has 0 values"),
        ({"lr": "0.1"}, "lr='0.1': expected a number, or one number for each of the 2 parameter"),
        ({"lr": None}, "lr=None: expected a number"),
        ({"lr": True}, "lr=True: expected a number"),
        ({"lr": np.array([True, False])}, "lr=[True, False]: expected a number"),
        ({"lr": 1j}, "lr=1j: expected a number"),
        ({"lr": [[0.1, 0.2]]}, "lr=[[0.1, 0.2]]: expected a number"),
        ({"lr": {"a": 1}}, "lr={'a': 1}: expected a number"),
        ({"lr": math.nan}, "lr=nan is not finite."),
        ({"lr": [0.1, math.inf]}, "lr=[0.1, inf] is not finite."),
        ({"lr": 10**400}, "is not finite."),
        ({"lr": -1e-9}, "lr=-1e-09 is negative; lr is at least 0."),
        ({"rho": [0.1, -0.1]}, "rho=[0.1, -0.1] is negative; rho is at least 0."),
        ({"rho": torch.tensor(-0.5)}, "rho=-0.5 is negative; rho is at least 0."),
    ],
)
def test_a_bad_hyper_parameter_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SessionError, match=re.escape(message)):
        merged(**given)


def test_a_batch_by_keyword_says_how_to_pass_it() -> None:
    with pytest.raises(SessionError, match="pass it inside the one dict"):
        merged_hyper({"lr": (0.1,)}, {"x": X}, DICT)
