"""Functions that the user names on the command line: ``file.py:function``, ``module:function``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from sam_export.cli.errors import CommandError, source_of
from sam_export.errors import SamExportError

FORMS = "path/to/file.py:function or package.module:function"


def load_function(name: str) -> Callable[..., Any]:
    """The function of that name; its module is imported.

    The current folder is put on the import path, as ``python -m`` does it.

    Args:
        name: ``path/to/file.py:function`` or ``package.module:function``.

    Raises:
        CommandError: Another form, no such file, module or function, or the import failed.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise CommandError(f"{name!r} is not of the form {FORMS}.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    try:
        function = getattr(module, attribute)
    except AttributeError as error:
        known = ", ".join(
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        )
        raise CommandError(
            f"{place} has no function {attribute!r}; it has {known or 'no functions'}."
        ) from error
    if not callable(function):
        raise CommandError(f"{name} is a {type(function).__name__}, not a function.")
    return function  # type: ignore[no-any-return]


def call_function(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function of the user's; what it raises is said with its own source line.

    Raises:
        CommandError: The arguments do not fit, or the function raised.
        SamExportError: The function raised one of ours; it is passed on as it is.
    """
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise CommandError(
            f"{name}{inspect.signature(function)} cannot be called: {error}."
        ) from error
    try:
        return function(*args, **kwargs)
    except SamExportError:
        raise
    except Exception as error:
        raise _user_error(f"{name} raised", error, inspect.getsourcefile(function)) from error


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments from ``name=value`` texts.

    A value is a Python literal (``0.1``, ``(512, 512)``, ``None``, ``'a b'``); a bare word is text.

    Raises:
        CommandError: Another form, or a name that is given twice.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise CommandError(f"--set {setting!r}: expected name=value.")
        if name in values:
            raise CommandError(f"--set {name} is given twice.")
        values[name] = _literal(setting, text)
    return values


def _literal(setting: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        if text.replace("-", "_").isidentifier():
            return text
        raise CommandError(
            f"--set {setting!r}: the value is neither a Python literal nor one word; quote text "
            "as in --set \"name='two words'\"."
        ) from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise CommandError(f"{path} does not exist (looked in {Path.cwd()}).")
    path = path.resolve()
    name = f"sam_export_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} cannot be imported as a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except SamExportError:
        raise
    except Exception as error:
        raise _user_error(f"Importing {path} failed:", error, str(path)) from error
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise CommandError(
                f"There is no module {error.name!r} (looked in {Path.cwd()} and in the installed "
                f"packages). A function is named as {FORMS}."
            ) from error
        raise _user_error(f"Importing {name} failed:", error, None) from error
    except SamExportError:
        raise
    except Exception as error:
        spec = importlib.util.find_spec(name)
        raise _user_error(
            f"Importing {name} failed:", error, spec.origin if spec is not None else None
        ) from error


def _user_error(what: str, error: Exception, file: str | None) -> CommandError:
    place = source_of(error, file) if file else None
    where = f" ({place})" if place else ""
    return CommandError(
        f"{what} {type(error).__name__}: {error}{where}. --traceback shows the way there."
    )
