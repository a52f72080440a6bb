"""What a manifest must be, to be written and to be read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from sam_export.artifact.contract import HyperSpec, ProgramSpec, StepContract, TensorSpec
from sam_export.artifact.manifest import STATE_FILE, FileEntry, Manifest, check_contract
from sam_export.artifact.semantics import Semantics
from sam_export.errors import ArtifactError
from tests.artifact.toy import ADAMW, METRICS, MODEL, make_contract


def manifest(**changes: Any) -> Manifest:
    contract = changes.get("contract", make_contract())
    files = {f"{p.name}.bin": FileEntry("0" * 64, 9, (p.name,)) for p in contract.programs}
    plain = Manifest(
        target="numpy",
        contract=contract,
        semantics=Semantics(running_stats="both"),
        files={**files, STATE_FILE: FileEntry("1" * 64, 9, ())},
        versions={"sam_export": "0.1.0"},
        details={"b": [1, 2.5, None], "a": {"nested": True}},
    )
    return replace(plain, **changes)


def values_of(plain: Manifest) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(plain.to_json())
    return values


CONTRACTS = {
    "momentum": make_contract(),
    "adamw": make_contract(slots=ADAMW, optimizer="AdamW"),
    "stateless": make_contract(slots=()),
    "two groups": make_contract(groups=(("weight",), ("bias",))),
    "dict batches": make_contract(batch_kind="dict", dims={"batch": 2}),
    "outputs in no alphabetic order": make_contract(
        outputs=(
            TensorSpec("output.z", "output", "float32", ("batch", 1)),
            TensorSpec("output.a.0", "output", "float32", ("batch",)),
            TensorSpec("output.a.1", "output", "int64", ("2*batch", 3)),
        ),
        output_tree={"dict": {"z": "tensor", "n": None, "a": {"tuple": ["tensor", "tensor"]}}},
    ),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_manifest_comes_back_equal_and_to_the_same_bytes(name: str) -> None:
    plain = manifest(contract=CONTRACTS[name])
    data = plain.to_json()
    found = Manifest.from_json(data)
    assert found == plain
    assert found.to_json() == data
    assert list(json.dumps(found.contract.output_tree)) == list(
        json.dumps(plain.contract.output_tree)
    )


def test_the_order_in_which_dicts_were_filled_does_not_matter() -> None:
    plain = manifest()
    other = replace(
        plain,
        files=dict(reversed(plain.files.items())),
        details={"a": {"nested": True}, "b": [1, 2.5, None]},
    )
    assert other.to_json() == plain.to_json()


@pytest.mark.parametrize("found", [0, 2, "1", None, 1.0, True])
def test_another_format_number_is_refused_and_named(found: Any) -> None:
    values = {**values_of(manifest()), "format": found}
    message = f"format number is {found!r}; this version of sam_export reads format 1.*0.1.0"
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(json.dumps(values).encode())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "It is not JSON"),
        (b"{", "It is not JSON"),
        (b"\xff\xfe\x00", "It is not JSON"),
        (b"[" * 100_000, "It is not JSON"),
        (b'{"format": NaN}', "It is not JSON: NaN"),
        (b"[]", "no format number"),
        (b"{}", "no format number"),
        (b'{"format": 1}', "missing: contract, details, files"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(data)


SOUND = [
    ("target", "text"),
    ("versions", {"unknown": 1}),
    ("details", {"unknown": 1}),
]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in ("target", "contract", "semantics", "files", "versions", "details")
        for value in (None, 3, "text", [], [1], {"unknown": 1})
        if (key, value) not in SOUND
    ],
)
def test_a_field_of_another_kind_is_refused(key: str, value: Any) -> None:
    values = {**values_of(manifest()), key: value}
    with pytest.raises(ArtifactError):
        Manifest.from_json(json.dumps(values).encode())


def test_an_unknown_field_is_refused() -> None:
    values = {**values_of(manifest()), "licence": "none"}
    with pytest.raises(ArtifactError, match="missing: nothing; unknown: licence"):
        Manifest.from_json(json.dumps(values).encode())


@pytest.mark.parametrize(
    "name", ["../step.bin", "/etc/passwd", "a/b", "a\\b", "c:d", "", ".", "..", "manifest.json"]
)
def test_a_file_outside_of_the_folder_is_refused(name: str) -> None:
    plain = manifest()
    files = {name: FileEntry("0" * 64, 9, ("step",))}
    files |= {key: entry for key, entry in plain.files.items() if entry.programs != ("step",)}
    with pytest.raises(ArtifactError, match="cannot be a file of an artifact"):
        replace(plain, files=files).to_json()


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("step.bin", {}, "hold the programs evaluate, evaluate_loss, the contract has"),
        ("none", {"more.bin": "more"}, "hold the programs evaluate, evaluate_loss, more, step"),
        ("none", {"again.bin": "step"}, "evaluate, evaluate_loss, step, step"),
        (STATE_FILE, {}, "state.safetensors is not among the files"),
    ],
)
def test_the_files_are_the_programs_and_the_state(
    remove: str, add: dict[str, str], message: str
) -> None:
    plain = manifest()
    files = {name: entry for name, entry in plain.files.items() if name != remove}
    files |= {name: FileEntry("0" * 64, 9, (program,)) for name, program in add.items()}
    with pytest.raises(ArtifactError, match=message):
        replace(plain, files=files).check()


@pytest.mark.parametrize("details", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
def test_details_that_json_cannot_hold_are_refused(details: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="cannot be written as JSON"):
        manifest(details=details).to_json()


def program_with(contract: StepContract, **changes: Any) -> StepContract:
    step, *others = contract.programs
    return replace(contract, programs=(replace(step, **changes), *others))


PLAIN = make_contract()
STEP = PLAIN.programs[0]
FIRST, *REST = PLAIN.state
UNSOUND = {
    "'weight' occurs twice among the graph inputs": replace(PLAIN, state=(FIRST, *PLAIN.state)),
    "weight: unknown role 'knob'": replace(PLAIN, state=(replace(FIRST, role="knob"), *REST)),
    "weight: dtype 'float'": replace(PLAIN, state=(replace(FIRST, dtype="float"), *REST)),
    "not understood": replace(PLAIN, state=(replace(FIRST, dtype="float33"), *REST)),
    r"the shape of state is fixed, found float32\[batch, 3\]": replace(
        PLAIN, state=(replace(FIRST, shape=("batch", 3)), *REST)
    ),
    "slot 'momentum_buffer' of an unknown parameter 'gone'": replace(
        PLAIN, state=(*PLAIN.state[:-1], replace(PLAIN.state[-1], parameter="gone"))
    ),
    "symbolic size that `dims` does not list": replace(PLAIN, dims={"time": 1}),
    r"dims \{'batch': -1\}": replace(PLAIN, dims={"batch": -1}),
    "batch_kind 'list'": replace(PLAIN, batch_kind="list"),
    "a group holds more than parameters": replace(PLAIN, groups=(("weight", "seen"),)),
    "lr: defaults .* expected 1 finite numbers": replace(
        PLAIN, hyper=(HyperSpec("lr", (0.1, 0.1)), PLAIN.hyper[1])
    ),
    "rho: defaults": replace(PLAIN, hyper=(PLAIN.hyper[0], HyperSpec("rho", (float("nan"),)))),
    "no program 'step'": replace(PLAIN, programs=PLAIN.programs[1:]),
    "'step' occurs twice among the programs": replace(PLAIN, programs=(STEP, *PLAIN.programs)),
    "step: unknown inputs y": program_with(PLAIN, inputs=(*STEP.inputs, "y")),
    "'x' occurs twice among the inputs": program_with(PLAIN, inputs=(*STEP.inputs, "x")),
    "'loss' occurs twice among the outputs": program_with(
        PLAIN, outputs=(*STEP.outputs, METRICS[0])
    ),
    "output 'gone' cannot become the state 'weight'": program_with(PLAIN, feeds={"gone": "weight"}),
    "output 'next.weight' cannot become the state 'bias'": program_with(
        PLAIN, feeds={"next.weight": "bias"}
    ),
    "'weight' occurs twice among the state that step feeds": program_with(
        PLAIN, feeds={"next.weight": "weight", "next.bias": "weight"}
    ),
    "step lacks the outputs loss, finite": program_with(
        PLAIN, outputs=tuple(s for s in STEP.outputs if s.name not in ("loss", "finite"))
    ),
    r"outputs \['output'\], the output tree has \['output.0'\]": replace(
        PLAIN, output_tree={"tuple": ["tensor"]}
    ),
    "The contract is malformed": replace(PLAIN, output_tree={"tuple": ["tensor", "tensor"]}),
}


@pytest.mark.parametrize("message", UNSOUND)
def test_a_contract_that_contradicts_itself_is_refused(message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_contract(UNSOUND[message])


def test_outputs_in_another_order_than_the_tree_are_refused() -> None:
    contract = CONTRACTS["outputs in no alphabetic order"]
    tree = {"dict": dict(sorted(contract.output_tree["dict"].items()))}  # as `jq -S` would do
    with pytest.raises(ArtifactError, match="the output tree has"):
        check_contract(replace(contract, output_tree=tree))


def test_state_that_a_step_leaves_alone_needs_no_output() -> None:
    kept = {name: state for name, state in STEP.feeds.items() if state != "seen"}
    outputs = tuple(spec for spec in STEP.outputs if spec.name != "next.seen")
    check_contract(program_with(PLAIN, feeds=kept, outputs=outputs))
    assert MODEL[2].name == "seen"


def test_a_contract_of_a_newer_version_is_refused() -> None:
    """Passing over a field that says what a step means would run another step."""
    values = {**PLAIN.to_dict(), "ascent_noise": 0.1}
    with pytest.raises(ArtifactError, match="has ascent_noise, which this version .* not know"):
        StepContract.from_dict(values)


def test_an_older_contract_has_nothing_of_what_it_does_not_name() -> None:
    """Fields with a default came later."""
    values = PLAIN.to_dict()
    for name in ("carried", "multiples", "loss_scaling", "every", "variant"):
        del values[name]
    assert StepContract.from_dict(values) == PLAIN
    del values["groups"]
    with pytest.raises(ArtifactError, match="malformed: KeyError.*groups"):
        StepContract.from_dict(values)


def test_stages_come_all_three_with_what_goes_between_them() -> None:
    gradient = TensorSpec("gradient.w", "gradient", "float32", (3,))
    with pytest.raises(ArtifactError, match="of the stages only none, with 1 carried tensors"):
        check_contract(replace(PLAIN, carried=(gradient,)))
    ascent = ProgramSpec("ascent", (), (), {})
    with pytest.raises(ArtifactError, match="of the stages only ascent, with 1 carried"):
        check_contract(replace(PLAIN, carried=(gradient,), programs=(*PLAIN.programs, ascent)))
