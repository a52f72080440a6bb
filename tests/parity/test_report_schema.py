"""Real reports are what `docs/parity_report.schema.json` says, and the schema says no less."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import sam_export as sx
from sam_export.parity.difference import STAGES, Difference
from sam_export.parity.report import FORMAT, ParityReport, TargetReport
from sam_export.parity.series import TensorSeries
from sam_export.parity.tolerances import Tolerances
from sam_export.parity.verdict import Row
from tests.parity.cases import HYPER, RHO, batches_for, step_of
from tests.parity.loops import PlainLoop

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/parity_report.schema.json").read_text())


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report with targets that pass, differ, differ in a tensor that is not finite, and fail."""
    step = step_of("conv", "float32")
    sessions = {
        fault: PlainLoop(step.model, RHO, **HYPER, fault=fault)
        for fault in ("no perturbation", "nan", "running statistics twice")
    }
    report = sx.check_parity(
        step,
        batches_for("conv", "float32"),
        sessions=sessions,
        targets=["onnx", "torchscript", "no-such-target"],
        num_steps=3,
    )
    path = tmp_path_factory.mktemp("report") / "parity.json"
    report.to_json(path)
    text = path.read_text()
    assert '"batch_sizes": [ 16, 16, 7 ]' in text, "a list of numbers is on one line"
    return dict(json.loads(text))


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"] == {"const": FORMAT}


def test_a_real_report_is_what_the_schema_says(values: dict[str, Any]) -> None:
    Draft202012Validator(SCHEMA).validate(values)
    assert {target["ok"] for target in values["targets"]} == {True, False}
    assert all(target["differences"] for target in values["targets"][:3])


@pytest.mark.parametrize(
    ("part", "kind", "derived"),
    [
        ("row", Row, set()),
        ("series", TensorSeries, set()),
        ("difference", Difference, set()),
        ("target", TargetReport, {"ok", "noise", "growth"}),
        (None, ParityReport, {"ok", "format", "reasons"}),
    ],
)
def test_the_schema_has_every_field_and_no_other(
    part: str | None, kind: Any, derived: set[str]
) -> None:
    schema = SCHEMA["$defs"][part] if part else SCHEMA
    assert set(schema["properties"]) == {item.name for item in fields(kind)} | derived
    assert set(schema["required"]) == set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_the_schema_names_stages_and_tolerances() -> None:
    stages = SCHEMA["$defs"]["difference"]["properties"]["stage"]["enum"]
    assert stages == list(STAGES)
    assert SCHEMA["properties"]["tolerances"]["required"] == [f.name for f in fields(Tolerances)]


def test_every_tolerance_has_its_reason(values: dict[str, Any]) -> None:
    assert set(values["reasons"]) == set(values["tolerances"])
    assert values["reasons"]["permutations"].startswith("Oracle runs with permuted batches")
    assert values["reasons"]["kernel"].endswith("they are reported as different.")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: v.update(format=1),
        lambda v: v.pop("ledger"),
        lambda v: v["targets"][0].update(more=1),
        lambda v: v["targets"][0]["rows"][0].update(verdict="fine"),
        lambda v: v["targets"][0]["differences"][0].update(cosine=1.5),
        lambda v: v["targets"][0]["series"][0].pop("absent"),
    ],
)
def test_the_schema_refuses_what_is_not_a_report(
    values: dict[str, Any], spoil: Callable[[dict[str, Any]], Any]
) -> None:
    spoiled = copy.deepcopy(values)
    spoil(spoiled)
    assert not Draft202012Validator(SCHEMA).is_valid(spoiled)
