"""A pytest plugin: one line per model in a user's own test suite.

::

    def test_my_model(sam_parity):
        sam_parity("recipes.py:my_model", targets=["onnx"])

The fixture ``sam_parity`` fails the test with the parity report. The marker ``sam_parity`` gives
its defaults to a test, a class or a module: ``@pytest.mark.sam_parity(targets=["onnx"], steps=5)``.
Artifacts are kept in pytest's cache, so a model that did not change is not built again.
``--sam-parity-report DIR`` writes each report there as HTML and JSON.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sam_export.parity.report import ParityReport
    from sam_export.step.train_step import TrainStep

STEPS = 5
"""Steps of each rollout where a test says nothing else."""

Recipe = str | Callable[..., Any] | tuple[Any, Iterable[Any]]
"""``file.py:function`` or ``module:function``, the function itself, or what it returns."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--sam-parity-report``."""
    group = parser.getgroup("sam_export")
    group.addoption(
        "--sam-parity-report",
        metavar="DIR",
        default=None,
        help="write the report of each sam_parity check to DIR, as HTML and JSON",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker."""
    config.addinivalue_line(
        "markers",
        "sam_parity(targets=..., steps=..., **options): defaults of the fixture sam_parity",
    )


@pytest.fixture
def sam_parity(request: pytest.FixtureRequest) -> Callable[..., ParityReport]:
    """Compares a recipe's step on targets with plain eager PyTorch; fails where they differ.

    The fixture is a function ``sam_parity(recipe, *, settings={}, steps=5, **options)``: ``recipe``
    as in `Recipe`, ``settings`` its keyword arguments, ``options`` those of
    `sam_export.check_parity` (``targets``, ``artifacts``, ``reference``, ``dynamic``, ``seed``, …).
    It returns the report. What cannot be compared is an error, not a failure.
    """
    options = dict(_marked(request.node))
    kept = request.config.cache
    if kept is not None:
        options.setdefault("cache", kept.mkdir("sam_export"))
    folder = request.config.getoption("--sam-parity-report")

    def check(recipe: Recipe, **given: Any) -> ParityReport:
        __tracebackhide__ = True
        from sam_export.parity.check import check_parity

        merged = {**options, **given}
        settings = merged.pop("settings", {})
        steps = int(merged.pop("steps", STEPS))
        step, batches = _made(recipe, settings, request.config.rootpath)
        taken = [batch for _, batch in zip(range(steps), batches, strict=False)]
        report = check_parity(step, taken, num_steps=steps, **merged)
        if folder is not None:
            _write(report, Path(folder), request.node.nodeid)
        if not report.ok:
            pytest.fail(f"\n{report}", pytrace=False)
        return report

    return check


def _marked(node: pytest.Item) -> Mapping[str, Any]:
    """Keywords of the markers, the nearest one last."""
    merged: dict[str, Any] = {}
    for marker in reversed(list(node.iter_markers("sam_parity"))):
        if marker.args:
            raise pytest.UsageError(
                f"sam_parity{marker.args}: the marker takes keywords only, such as targets=['onnx']"
            )
        merged |= marker.kwargs
    return merged


def _made(recipe: Recipe, settings: Mapping[str, Any], root: Path) -> tuple[TrainStep, Any]:
    from sam_export.cli.recipe import checked_recipe, load_recipe_function

    if isinstance(recipe, tuple):
        return checked_recipe("the recipe", recipe)
    if isinstance(recipe, str):
        place, _, function = recipe.rpartition(":")
        if place.endswith(".py") and not Path(place).is_absolute():
            place = str(root / place)
        return load_recipe_function(f"{place}:{function}", settings)
    return checked_recipe(getattr(recipe, "__name__", "the recipe"), recipe(**settings))


def _write(report: ParityReport, folder: Path, test: str) -> None:
    from sam_export.report.parity_html import write_html

    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", test)
    report.to_json(folder / f"{name}.json")
    write_html(report, folder / f"{name}.html")
