"""Functions named on the command line, and the settings for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sam_export.cli.errors import CommandError
from sam_export.cli.function import call_function, load_function, parse_settings
from sam_export.errors import StepConfigError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in a folder of its own, and leaves the import path as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_file_and_module_name_the_same_function() -> None:
    Path("twice.py").write_text("def double(x):\n    return 2 * x\n")
    assert load_function("twice.py:double")(4) == 8
    assert load_function("twice:double")(5) == 10


def test_file_can_import_its_neighbours_of_the_current_folder() -> None:
    Path("neighbour_of_recipe.py").write_text("VALUE = 7\n")
    Path("recipes").mkdir()
    Path("recipes/one.py").write_text(
        "from neighbour_of_recipe import VALUE\ndef get():\n    return VALUE\n"
    )
    assert load_function("recipes/one.py:get")() == 7


@pytest.mark.parametrize("name", ["recipe.py", "module", ":function", "recipe.py:", ""])
def test_wrong_form(name: str) -> None:
    with pytest.raises(CommandError, match=r"path/to/file\.py:function or package\.module"):
        load_function(name)


def test_missing_file() -> None:
    with pytest.raises(CommandError, match=r"nowhere/recipe\.py does not exist \(looked in"):
        load_function("nowhere/recipe.py:function")


@pytest.mark.parametrize("name", ["no_such_package_1.deep", "no_such_package_1", "json.no_such"])
def test_missing_module(name: str) -> None:
    with pytest.raises(CommandError, match="There is no module"):
        load_function(f"{name}:function")


def test_missing_import_inside_the_recipe_is_not_called_a_missing_recipe() -> None:
    Path("needs.py").write_text("import os\n\nimport no_such_package_1\n")
    with pytest.raises(
        CommandError, match=r"failed: ModuleNotFoundError: No module named.*needs\.py:3"
    ):
        load_function("needs.py:function")


def test_syntax_error_in_module() -> None:
    Path("unsound.py").write_text("def (:\n")
    with pytest.raises(CommandError, match="Importing unsound failed: SyntaxError"):
        load_function("unsound:function")


def test_missing_function_lists_those_there_are() -> None:
    Path("some.py").write_text("from os.path import join\ndef one(): ...\ndef two(): ...\n")
    with pytest.raises(CommandError, match=r"no function 'three'; it has one, two\."):
        load_function("some.py:three")


def test_not_a_function() -> None:
    Path("value.py").write_text("three = 3\n")
    with pytest.raises(CommandError, match="is a int, not a function"):
        load_function("value.py:three")


def test_error_in_the_function_says_its_line() -> None:
    Path("fails.py").write_text("import json\n\ndef fail():\n    return json.loads('{')\n")
    function = load_function("fails.py:fail")
    with pytest.raises(CommandError, match=r"fail raised JSONDecodeError: .*fails\.py:4\)"):
        call_function("fails.py:fail", function)


def test_our_errors_pass_through() -> None:
    def refuse() -> None:
        raise StepConfigError("no trainable parameter")

    with pytest.raises(StepConfigError, match="no trainable parameter"):
        call_function("refuse", refuse)


def test_wrong_arguments_show_the_signature() -> None:
    def recipe(depth: int = 2) -> int:
        return depth

    assert call_function("recipe", recipe, depth=3) == 3
    with pytest.raises(CommandError, match=r"recipe\(depth.*cannot be called.*'width'"):
        call_function("recipe", recipe, width=3)


def test_settings() -> None:
    texts = ["lr=0.1", "hidden=(8, 8)", "optimizer=adam-w", "name='a b'", "x=None", "flag=True"]
    assert parse_settings(texts) == {
        "lr": 0.1,
        "hidden": (8, 8),
        "optimizer": "adam-w",
        "name": "a b",
        "x": None,
        "flag": True,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lr"], "expected name=value"),
        (["=3"], "expected name=value"),
        (["a b=3"], "expected name=value"),
        (["lr=[1,"], "neither a Python literal nor one word"),
        (["lr=two words"], "neither a Python literal nor one word"),
        (["lr=__import__('os')"], "neither a Python literal nor one word"),
        (["lr="], "neither a Python literal nor one word"),
        (["lr=1", "lr=2"], "given twice"),
    ],
)
def test_wrong_settings(settings: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse_settings(settings)
