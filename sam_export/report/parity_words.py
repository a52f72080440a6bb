"""What a parity report says, in words and figures that its HTML and Markdown forms share.

Everything works on the values of the JSON form, so a report that was stored can be shown later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sam_export.errors import ParityError
from sam_export.parity.difference import INNER_STAGES, STAGES, stage_of
from sam_export.parity.report import FORMAT, ParityReport

Values = Mapping[str, Any]

MODES = ("lock-step", "free-running")

MODE_WORDS = {
    "start": "the start state",
    "lock-step": "lock-step: each step starts from eager's state",
    "free-running": "free-running: all steps from the start state",
}

ONLY_FREE = (
    "In lock-step every step is within its bound: the difference builds up over the steps, or it "
    "is in something that the session carries beside the state that lock-step puts back."
)


def as_values(report: ParityReport | Values) -> Values:
    """The JSON values of a report, or the given ones if they are of this version's format.

    Raises:
        ParityError: The values are of another format, or of something else.
    """
    values = report.to_dict() if isinstance(report, ParityReport) else report
    found = values.get("format")
    if found != FORMAT:
        raise ParityError(
            f"The report's format is {found!r}; this version of sam_export shows format {FORMAT}. "
            "Run the check again, or use the version that wrote the report."
        )
    # Through JSON, so that nothing is shown that a stored report would not have.
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    return plain


def number(value: float | None, digits: int = 3) -> str:
    """A number in a few digits; ``∞`` where it is null, since a report holds no infinite ones."""
    if value is None or math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    if isinstance(value, int) and abs(value) < 10**6:
        return str(value)
    if 1e-3 <= abs(value) < 1e5:
        # Rounded first: "g" alone writes 1e+03 for a thousand in three digits.
        return f"{float(f'{value:.{digits}g}'):.15g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def growth_words(growth: float | None) -> str:
    """The slope of a drift as the factor that it means for one step."""
    return "–" if growth is None else f"×{10**growth:.3g} per step"


def largest(errors: Sequence[float | None]) -> str:
    """The largest of the errors of all steps; null is infinite."""
    return number(max(math.inf if e is None else e for e in errors)) if errors else "–"


def plain_value(value: Any) -> str:
    """A value of the ledger as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain_value(item) for item in value) or "none"
    return str(value)


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Key and text of every leaf, nested keys joined with a space."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", "none" if value == {} else plain_value(value)


def verdict_sentence(values: Values) -> str:
    """The verdict on all targets."""
    targets = values["targets"]
    wrong = [target["name"] for target in targets if not target["ok"]]
    count = f"{len(targets)} target" + ("s" if len(targets) != 1 else "")
    what = f"eager SAM + {values['optimizer']}"
    if not wrong:
        each = "equals" if len(targets) == 1 else "each equal"
        return f"{count} {each} {what} within the tolerances."
    return f"{len(wrong)} of {count} not equal to {what}: {', '.join(wrong)}."


def facts_sentence(values: Values) -> str:
    """What was compared, and on what."""
    sizes = "/".join(str(size) for size in dict.fromkeys(values["batch_sizes"]))
    steps = values["num_steps"]
    return (
        f"{values['dtype']}, {steps} step{'s' if steps != 1 else ''} in each mode, batches of "
        f"{sizes}, seed {values['seed']}, device {values['device']}, "
        f"torch {values['versions'].get('torch', 'not known')}"
    )


def where(difference: Values) -> str:
    """Mode, step and stage of a difference."""
    if difference["mode"] == "start":
        return "in the state that it started from"
    return f"in {difference['mode']} step {difference['step']}, stage {difference['stage']}"


def unit_of(difference: Values) -> str:
    """What ``relative`` of a difference is a part of."""
    return "change" if difference["stage"] in ("slots", "parameters", "buffers") else "value"


def difference_facts(difference: Values) -> list[tuple[str, str]]:
    """Label and text of each figure of a difference that there is."""
    facts = []
    if difference["note"]:
        facts.append(("why", difference["note"]))
    if difference["index"] is None:
        return facts
    if difference["index"]:
        facts.append(("worst element", str(difference["index"])))
    facts += [
        ("found", "not finite" if difference["found"] is None else f"{difference['found']:.9g}"),
        ("expected", f"{difference['expected']:.9g}"),
    ]
    if difference["before"] is not None:
        since = "the step" if difference["mode"] == "lock-step" else "the first step"
        facts.append((f"before {since}", f"{difference['before']:.9g}"))
    if difference["not_finite"]:
        facts.append(
            ("not finite", f"{difference['not_finite']} of {difference['elements']} elements")
        )
    else:
        relative = difference["relative"]
        size = "" if relative is None else f" ({number(relative)} × the {unit_of(difference)})"
        facts.append(("error (L2 norm)", f"{number(difference['error'])}{size}"))
    if difference["elements"] > 1:
        if difference["cosine"] is not None:
            facts.append(("cosine of the changes", f"{difference['cosine']:.6f}"))
        if difference["length"] is not None:
            facts.append(("length of the change", f"{number(difference['length'], 4)} × eager's"))
    if difference["ulp_max"] is not None:
        text = f"{number(difference['ulp_max'])} ulp"
        if difference["elements"] > 1:
            text += f" at most, {number(difference['ulp_median'])} in the median"
        facts.append(("distance", text))
    if difference["elements"] > 1:
        facts.append(
            ("over their share", f"{difference['over']} of {difference['elements']} elements")
        )
    return facts


def ratios(series: Values) -> list[float | None]:
    """Error over bound at each step; infinite where a report has null, None where absent."""
    absent = set(series["absent"])
    return [
        None if step in absent else math.inf if ratio is None else ratio
        for step, ratio in enumerate(series["ratio"], 1)
    ]


def stage_states(target: Values, difference: Values) -> list[tuple[str, str]]:
    """Each stage of a step with ``differs``, ``ok`` or ``none`` (nothing compared) at the step of
    a difference. Gradients and perturbations are there where a target returns them."""
    roles = {row["name"]: row["role"] for row in target["rows"]}
    parameters = {name for name, role in roles.items() if role == "parameter"}
    seen: dict[str, bool] = {}
    for series in target["series"]:
        at = difference["step"] - 1
        if series["mode"] != difference["mode"] or not 0 <= at < len(series["ratio"]):
            continue
        ratio = ratios(series)[at]
        if ratio is not None:
            stage = stage_of(series["name"], parameters, series["mode"])
            seen[stage] = seen.get(stage, False) or ratio > 1.0
    words = {True: "differs", False: "ok", None: "none"}
    shown = [s for s in STAGES if s != "start" and (s in seen or s not in INNER_STAGES)]
    return [(stage, words[seen.get(stage)]) for stage in shown]


def counts(rows: Sequence[Values]) -> dict[str, int]:
    """Number of rows of each verdict."""
    return {
        verdict: sum(row["verdict"] == verdict for row in rows)
        for verdict in ("ok", "noise", "FAIL")
    }


def badness(row: Values) -> float:
    """Error in units of what is allowed; infinite where it could not be compared."""
    error, bound = row["error"], row["bound"]
    if error is None:
        return float("inf")
    if error == 0 or bound is None:
        return 0.0
    return float(error / bound) if bound > 0 else float("inf")
