"""A recipe: the user's function that returns the step to export and batches for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sam_export.cli.errors import CommandError
from sam_export.cli.function import call_function, load_function, parse_settings

if TYPE_CHECKING:
    import argparse

    from sam_export.step.train_step import TrainStep

HELP = (
    "function that returns (TrainStep, batches): path/to/file.py:function or "
    "package.module:function"
)


def add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Adds the arguments RECIPE (None where it is optional and left out) and --set."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?" if optional else None, help=HELP)
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="keyword argument of the recipe, a Python literal or one word; may be repeated",
    )


def load_recipe(name: str, settings: Sequence[str]) -> tuple[TrainStep, Iterable[Any]]:
    """Calls the recipe.

    Args:
        name: The RECIPE argument.
        settings: The ``name=value`` texts of ``--set``.

    Returns:
        The step, and its batches as the recipe returns them.

    Raises:
        CommandError: The recipe cannot be found, fails, or returns something else.
    """
    return load_recipe_function(name, parse_settings(settings))


def load_recipe_function(name: str, keywords: Mapping[str, Any]) -> tuple[TrainStep, Iterable[Any]]:
    """`load_recipe` with keyword arguments that are values already."""
    return checked_recipe(name, call_function(name, load_function(name), **keywords))


def checked_recipe(name: str, returned: Any) -> tuple[TrainStep, Iterable[Any]]:
    """What a recipe returned, which has to be a step and its batches.

    Raises:
        CommandError: It is something else.
    """
    from sam_export.step.train_step import TrainStep

    if not isinstance(returned, tuple) or len(returned) != 2:
        raise CommandError(
            f"{name} returned a {type(returned).__name__}; expected (TrainStep, batches)."
        )
    step, batches = returned
    if not isinstance(step, TrainStep):
        raise CommandError(
            f"{name} returned a {type(step).__name__} as its first value; expected a "
            "sam_export.TrainStep."
        )
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise CommandError(
            f"{name} returned a {type(batches).__name__} as its second value; expected a list of "
            "batches, or something else to iterate over."
        )
    return step, batches


def first_batches(name: str, batches: Iterable[Any], count: int) -> list[Any]:
    """The first ``count`` batches, or all where there are fewer.

    Raises:
        CommandError: There is not a single one.
    """
    taken = [batch for _, batch in zip(range(count), batches, strict=False)]
    if not taken:
        raise CommandError(f"{name} returned no batches; at least one is needed.")
    return taken
