"""The verdict on writing over state, on graphs built by hand: what to refuse, what to allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from sam_export.artifact.contract import ProgramSpec, TensorSpec
from sam_export.lower.onnx_guard import guard_update
from sam_export.lower.onnx_in_place import in_place

SIZE = 64


def model_of(nodes: Sequence[onnx.NodeProto], states: Sequence[str] = ("w",)) -> ir.Model:
    """Inputs ``x``, ``go`` and the states, all vectors; outputs ``next.*`` and ``finite``."""

    def info(name: str, kind: int, shape: list[int]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        list(nodes),
        "g",
        [info(name, TensorProto.FLOAT, [SIZE]) for name in ("x", *states)],
        [info("finite", TensorProto.BOOL, [])]
        + [info(f"next.{name}", TensorProto.FLOAT, [SIZE]) for name in states],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


def spec_of(states: Sequence[str] = ("w",)) -> ProgramSpec:
    outputs = [TensorSpec("finite", "metric", "bool", ())]
    outputs += [TensorSpec(f"next.{name}", "parameter", "float32", (SIZE,)) for name in states]
    return ProgramSpec(
        "step", ("x", *states), tuple(outputs), {f"next.{name}": name for name in states}
    )


def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}:{output}", **attributes)


FINITE = [
    node("ReduceSum", "g", "total", keepdims=0),
    node("IsNaN", "total", "nan"),
    node("Not", "nan", "finite"),
]

# A step whose gradient reads w: everything that reads w comes before its update.
SAFE = [node("Mul", "w x", "g"), *FINITE, node("Sub", "w g", "next.w")]

UNSAFE = {
    # `late` reads w but nothing orders it before the update of w.
    "an unordered reader": (
        [
            node("Mul", "w x", "g"),
            node("Sub", "w g", "next.w"),
            node("Exp", "w", "late"),
            node("ReduceSum", "late", "total", keepdims=0),
            node("IsNaN", "total", "nan"),
            node("Not", "nan", "finite"),
        ],
        "may run after",
    ),
    # The same through a view, which may share w's memory.
    "an unordered reader of a view": (
        [
            node("Mul", "w x", "g"),
            node("Sub", "w g", "next.w"),
            node("Flatten", "w", "flat", axis=0),
            node("ReduceSum", "flat", "total", keepdims=0),
            node("IsNaN", "total", "nan"),
            node("Not", "nan", "finite"),
        ],
        "may run after",
    ),
    # CumSum reads element j < i while it writes element i.
    "a writer that is not elementwise": (
        [
            node("Neg", "x", "g"),
            *FINITE,
            node("Constant", "", "axis", value_int=0),
            node("CumSum", "w axis", "next.w", reverse=1),
        ],
        "element by element",
    ),
    # The view may have w's memory but not w's element order.
    "a writer that reads the state through a view": (
        [
            node("Neg", "x", "g"),
            *FINITE,
            node("Constant", "", "shape", value_ints=[SIZE]),
            node("Reshape", "w shape", "view"),
            node("Sub", "view g", "next.w"),
        ],
        "element by element",
    ),
}


@pytest.mark.parametrize("guarded", [False, True])
def test_a_safe_update_is_allowed(guarded: bool) -> None:
    model, spec = model_of(SAFE), spec_of()
    if guarded:
        guard_update(model, spec, spec.feeds)
    assert in_place(model, spec) == {"w": ""}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_update_is_refused(case: str) -> None:
    nodes, reason = UNSAFE[case]
    assert reason in in_place(model_of(nodes), spec_of())["w"]


@pytest.mark.parametrize("case", ["a writer that is not elementwise"])
def test_an_unsafe_update_is_refused_inside_the_guard_too(case: str) -> None:
    nodes, reason = UNSAFE[case]
    model, spec = model_of(nodes), spec_of()
    guard_update(model, spec, spec.feeds)
    assert reason in in_place(model, spec)["w"]


def test_the_guard_makes_an_unordered_reader_wait() -> None:
    """`late` decides whether to update at all, so with the guard it comes first."""
    model, spec = model_of(UNSAFE["an unordered reader"][0]), spec_of()
    guard_update(model, spec, spec.feeds)
    assert in_place(model, spec) == {"w": ""}


def test_state_that_another_update_reads_inside_the_guard_is_refused() -> None:
    """v' reads the old w, and nothing orders that before w' is written."""
    nodes = [
        node("Mul", "w x", "g"),
        *FINITE,
        node("Sub", "w g", "next.w"),
        node("Add", "v w", "next.v"),
    ]
    model, spec = model_of(nodes, ("w", "v")), spec_of(("w", "v"))
    guard_update(model, spec, spec.feeds)
    verdict = in_place(model, spec)
    assert "may run after" in verdict["w"]
    assert verdict["v"] == ""


def test_two_states_that_swap_are_refused() -> None:
    nodes = [
        node("Mul", "w x", "g"),
        *FINITE,
        node("Identity", "v", "next.w"),
        node("Identity", "w", "next.v"),
    ]
    verdict = in_place(model_of(nodes, ("w", "v")), spec_of(("w", "v")))
    assert all(verdict.values())


@pytest.mark.parametrize("finite", [True, False])
def test_the_guard_keeps_the_old_state_in_place(finite: bool) -> None:
    """What the verdict allows is right when it runs, both ways of the branch."""
    model, spec = model_of(SAFE), spec_of()
    guard_update(model, spec, spec.feeds)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    w = np.arange(SIZE, dtype=np.float32)
    x = np.full(SIZE, 0.25 if finite else np.nan, np.float32)
    expected = w - w * x if finite else w.copy()
    value = ort.OrtValue.ortvalue_from_numpy(w)
    binding = session.io_binding()
    binding.bind_ortvalue_input("w", value)
    binding.bind_ortvalue_output("next.w", value)
    binding.bind_cpu_input("x", x)
    binding.bind_output("finite", "cpu")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(value.numpy(), expected)
