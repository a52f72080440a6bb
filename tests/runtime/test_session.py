"""`Session` over an engine in plain NumPy: results, state, refusals that change nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_export.artifact.contract import METRICS, TensorSpec
from sam_export.artifact.result import DeviceValue
from sam_export.artifact.semantics import Semantics
from sam_export.errors import ArtifactError, SessionError
from sam_export.runtime.session import Session
from tests.artifact.toy import (
    ADAMW,
    NumpyEngine,
    State,
    example_batch,
    files_of,
    make_contract,
    make_session,
    random_state,
)


def snapshot(session: Session) -> tuple[Any, ...]:
    """Everything that a refused call may not change."""
    state = {name: (array.dtype, array.tobytes()) for name, array in session.state.items()}
    return state, session.hyper, session.step_count


def assert_same(one: State, other: State) -> None:
    assert list(one) == list(other)
    for name, array in one.items():
        assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape), name
        assert array.tobytes() == other[name].tobytes(), name


def test_steps_train_and_report() -> None:
    session = make_session()
    batches = [example_batch(32, seed) for seed in range(8)]
    losses = [float(session.step(*batches[i % 8], lr=0.02, rho=0.01).loss) for i in range(160)]
    assert losses[-1] < 1e-3 < losses[0]
    assert session.step_count == 160
    assert session.state["seen"] == 160 * 32
    np.testing.assert_allclose(session.state["weight"], [[1.0, -2.0, 0.5]], atol=0.05)


def test_a_result_holds_device_values_that_stay_valid() -> None:
    session = make_session()
    result = session.step(*example_batch())
    assert all(isinstance(getattr(result, name), DeviceValue) for name in METRICS)
    first = float(result.loss)
    for _ in range(3):
        session.step(*example_batch())
    assert float(result.loss) == first
    assert first == pytest.approx(float(np.mean(example_batch()[1] ** 2)))
    assert bool(result.finite) is True
    assert float(result.perturbation_norm) == pytest.approx(0.05)
    assert float(result.perturbed_loss) > first
    assert result.outputs is None


def test_outputs_come_in_the_structure_of_the_model() -> None:
    named = tuple(TensorSpec(f"output.{k}", "output", "float32", ("batch", 1)) for k in "zab")
    tree = {"dict": {"z": "tensor", "a": "tensor", "none": None, "b": "tensor"}}
    contract = make_contract(outputs=named, step_outputs=named, output_tree=tree)

    class Engine(NumpyEngine):
        def run(self, *args: Any) -> dict[str, Any]:
            results = super().run(*args)
            for index, key in enumerate("baz"):  # another order than the contract's
                results[f"output.{key}"] = np.full((4, 1), index, np.float32)
            return results

    session = make_session(contract, engine=Engine())
    x, y = example_batch()
    outputs = session.evaluate(x)
    assert list(outputs) == ["z", "a", "none", "b"]
    assert outputs["none"] is None
    assert [float(outputs[key][0, 0]) for key in "baz"] == [0, 1, 2]
    outputs = session.step(x, y).outputs
    assert [float(outputs[key].numpy()[0, 0]) for key in "baz"] == [0, 1, 2]
    assert isinstance(outputs["z"], DeviceValue)


def test_evaluation_returns_numpy_and_changes_nothing() -> None:
    session = make_session()
    x, y = example_batch()
    session.step(x, y)
    before = snapshot(session)
    output = session.evaluate(x)
    assert isinstance(output, np.ndarray)
    state = session.state
    np.testing.assert_array_equal(output, x @ state["weight"].T + state["bias"])
    loss = session.evaluate_loss(x, y)
    assert type(loss) is float
    assert loss == pytest.approx(float(np.mean((output - y) ** 2)))
    assert snapshot(session) == before


def test_a_program_that_is_not_there_is_named() -> None:
    contract = make_contract()
    session = make_session(make_contract(programs=contract.programs[:1]))
    with pytest.raises(SessionError, match="No program 'evaluate' in this step; it has step"):
        session.evaluate(example_batch()[0])
    with pytest.raises(SessionError, match="No program 'evaluate_loss'.*Export the step again"):
        session.evaluate_loss(*example_batch())


def test_state_is_a_copy() -> None:
    session = make_session()
    state = session.state
    state["weight"][:] = 7
    assert (session.state["weight"] == 0).all()
    given = random_state(session.contract)
    session.set_state(given)
    given["weight"][:] = 7
    assert_same(session.state, random_state(session.contract))


def test_a_new_state_may_have_any_layout_but_must_be_whole() -> None:
    session = make_session()
    state = random_state(session.contract)
    transposed = {**state, "weight": np.asfortranarray(np.repeat(state["weight"], 2, 0))[::2]}
    session.set_state(dict(reversed(transposed.items())))
    assert_same(session.state, state)
    before = snapshot(session)
    for wrong, message in [
        ({**state, "more": np.zeros(1)}, "more: not a tensor of this step"),
        ({k: v for k, v in state.items() if k != "seen"}, "seen: missing"),
        ({**state, "bias": state["bias"].astype(">f4")}, r"bias: >f4\[1\], expected float32\[1\]"),
        ({**state, "bias": [1.0]}, r"bias: float64\[1\], expected float32\[1\]"),
    ]:
        with pytest.raises(SessionError, match=message):
            session.set_state(wrong)
        with pytest.raises(SessionError, match=message):
            make_session(state=wrong)
    assert snapshot(session) == before


def test_repr_says_what_runs_where() -> None:
    session = make_session()
    session.step(*example_batch(), lr=0.5)
    text = repr(session)
    for part in ("numpy on cpu by NumPy", "SGD", "2 parameters", "step 1", "lr (0.5,)"):
        assert part in text


# -- hyper-parameters -----------------------------------------------------------------------------


def test_hyper_parameters_keep_their_last_value() -> None:
    engine = NumpyEngine()
    session = make_session(make_contract(groups=(("weight",), ("bias",))), engine=engine)
    assert session.hyper == {"lr": (0.1, 0.1), "rho": (0.05, 0.05)}
    batch = example_batch()
    session.step(*batch)
    session.step(*batch, lr=0.3)
    session.step(*batch, rho=[0.0, 0.2])
    session.step(*batch)
    assert [hyper for _, hyper in engine.runs] == [
        {"lr": (0.1, 0.1), "rho": (0.05, 0.05)},
        {"lr": (0.3, 0.3), "rho": (0.05, 0.05)},
        {"lr": (0.3, 0.3), "rho": (0.0, 0.2)},
        {"lr": (0.3, 0.3), "rho": (0.0, 0.2)},
    ]
    assert session.hyper == {"lr": (0.3, 0.3), "rho": (0.0, 0.2)}
    session.hyper["lr"] = (9.0, 9.0)
    assert session.hyper["lr"] == (0.3, 0.3)


def test_a_program_gets_only_the_hyper_parameters_that_it_reads() -> None:
    engine = NumpyEngine()
    make_session(engine=engine).evaluate(example_batch()[0])
    assert engine.runs == [("evaluate", {})]


# -- not finite -----------------------------------------------------------------------------------


def bad_batch() -> tuple[Any, Any]:
    x, y = example_batch()
    x[0, 0] = np.nan
    return x, y


def test_skip_reports_and_changes_no_state() -> None:
    session = make_session()
    session.step(*example_batch())
    before = session.state
    result = session.step(*bad_batch(), lr=0.5)
    assert bool(result.finite) is False
    assert np.isnan(float(result.loss))
    assert_same(session.state, before)
    assert (session.step_count, session.hyper["lr"]) == (2, (0.5,))
    assert bool(session.step(*example_batch()).finite)


def test_raise_changes_nothing_at_all() -> None:
    session = make_session(semantics=Semantics(on_nonfinite="raise"))
    session.step(*example_batch())
    before = snapshot(session)
    message = "Step 2 is not finite .loss nan, perturbed loss nan, gradient norm nan, .*nothing was"
    with pytest.raises(SessionError, match=message):
        session.step(*bad_batch(), lr=0.5)
    assert snapshot(session) == before
    assert bool(session.step(*example_batch()).finite)
    assert session.step_count == 2


def test_ignore_applies_the_update() -> None:
    session = make_session(semantics=Semantics(on_nonfinite="ignore"))
    result = session.step(*bad_batch())
    assert not bool(result.finite)
    assert np.isnan(session.state["weight"]).any()


# -- refusals and failures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "hyper", "message"),
    [
        ((), {}, "step takes 2 tensors, x .* it was given no batch"),
        (example_batch()[:1], {}, "it was given 1 tensors"),
        (example_batch(), {"lr": -0.1}, "lr=-0.1 is negative"),
        (example_batch(), {"lr": 0.2, "roh": 0.1}, "Unknown hyper-parameter 'roh'.*mean 'rho'"),
        ((example_batch()[0][:, :2], example_batch()[1]), {"lr": 0.2}, "is 2 and must be 3"),
    ],
)
def test_a_refused_step_never_reaches_the_engine(
    batch: Any, hyper: dict[str, Any], message: str
) -> None:
    engine = NumpyEngine()
    session = make_session(engine=engine)
    before = snapshot(session)
    with pytest.raises(SessionError, match=message):
        session.step(*batch, **hyper)
    assert snapshot(session) == before
    assert engine.runs == []


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_engine_that_fails_is_heard_as_it_is(error: BaseException) -> None:
    engine = NumpyEngine()
    session = make_session(engine=engine)
    session.step(*example_batch())
    before = snapshot(session)
    engine.fails_with = error
    with pytest.raises(type(error)) as caught:
        session.step(*example_batch(), lr=0.7, rho=0.9)
    assert caught.value is error
    engine.fails_with = None
    assert snapshot(session) == before


# -- checkpoints ----------------------------------------------------------------------------------


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    batches = [example_batch(seed=seed) for seed in range(10)]
    straight = make_session()
    for index, batch in enumerate(batches):
        straight.step(*batch, lr=0.1 / (1 + index))
        if index == 4:
            straight.save(tmp_path / "run.ckpt")
    resumed = make_session()
    resumed.step(*example_batch(seed=99), rho=0.5)
    resumed.restore(tmp_path / "run.ckpt")
    assert resumed.step_count == 5
    assert resumed.hyper == {"lr": (0.1 / 5,), "rho": (0.05,)}
    for index, batch in list(enumerate(batches))[5:]:
        resumed.step(*batch, lr=0.1 / (1 + index))
    assert_same(resumed.state, straight.state)
    assert (resumed.step_count, resumed.hyper) == (straight.step_count, straight.hyper)


def test_a_wrong_checkpoint_changes_nothing(tmp_path: Path) -> None:
    session = make_session()
    session.step(*example_batch(), lr=0.3)
    before = snapshot(session)
    other = make_session(make_contract(slots=ADAMW, optimizer="AdamW"))
    other.save(tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"another model or optimizer.*slot\.momentum_buffer"):
        session.restore(tmp_path / "other")
    with pytest.raises(ArtifactError, match="absent does not exist"):
        session.restore(tmp_path / "absent")
    (tmp_path / "garbage").write_bytes(bytes(99))
    with pytest.raises(ArtifactError, match="damaged"):
        session.restore(tmp_path / "garbage")
    assert snapshot(session) == before


def test_saving_to_a_bad_place_changes_nothing(tmp_path: Path) -> None:
    session = make_session()
    (tmp_path / "file").write_text("precious")
    before = files_of(tmp_path)
    with pytest.raises(ArtifactError, match="Cannot write the checkpoint"):
        session.save(tmp_path / "file" / "run.ckpt")
    with pytest.raises(ArtifactError, match="is a folder"):
        session.save(tmp_path)
    assert files_of(tmp_path) == before


def test_the_outputs_of_a_step_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from tests.artifact.toy import example_batch, make_session\n"
        "session = make_session()\n"
        "float(session.step(*example_batch()).loss), session.evaluate_loss(*example_batch())\n"
        "loaded = {'torch', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
