"""A room imports only rooms above it (`docs/architecture.md`), and torch only where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sam_export"

ROOMS = (
    ("errors", "_version", "_compat"),
    ("artifact",),
    ("step",),
    ("tracing",),
    ("lower", "runtime"),
    ("api",),
    ("parity",),
    ("report",),
    ("cli",),
    ("__init__", "__main__"),
)
"""From the top down; rooms on one line do not know each other."""

RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

NEEDS_NO_TORCH = ("errors", "_version", "artifact", "runtime", "api", "cli", "__init__", "__main__")
"""Rooms that are imported on the training machine, where there is neither torch nor onnx."""

EXEMPT = (
    "runtime/aot_inductor.py",
    "runtime/model_exported.py",
    "runtime/model_torchscript.py",
    "runtime/torch_compile.py",
    "runtime/torch_cuda_graph.py",
    "runtime/torch_engine.py",
    "runtime/torchscript.py",
)
"""Files of these rooms that run with torch, and are imported only when they are needed."""

ORACLE = (
    "parity/oracle.py",
    "parity/oracle_average.py",
    "parity/oracle_batch.py",
    "parity/oracle_once.py",
    "parity/oracle_parts.py",
    "parity/oracle_precision.py",
    "parity/oracle_random.py",
    "parity/oracle_slots.py",
    "parity/oracle_state.py",
    "parity/oracle_surroundings.py",
    "parity/oracle_variants.py",
)
"""Files that share no code with the rest; the first one uses the second."""

EXPORT_PACKAGES = ("torch", "onnx", "onnxscript", "onnx_ir")
OUTSIDE = ("models", "scripts", "tests")


def imports(source: str, file: str) -> Iterator[tuple[str, int, bool]]:
    """Each imported module with its line, and whether it is imported when the file is."""
    tree = ast.parse(source)
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _for_types(node)
        for inner in ast.walk(node)
    }
    package = ["sam_export", *Path(file).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) not in late
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from sam_export import x`: x is a room, or a name of the façade
            rooms = [alias.name for alias in node.names if alias.name in RANKS]
            names = rooms if module == "sam_export" else []
            for name in [f"{module}.{name}" for name in names] or [module]:
                yield name, node.lineno, id(node) not in late


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def violations(sources: Mapping[str, str]) -> list[str]:
    """Every import that a room may not have, as ``file:line: why``.

    Args:
        sources: Path below the package to the file's text.
    """
    found = []
    for file, source in sources.items():
        room = Path(file).parts[0].removesuffix(".py")
        if room not in RANKS:
            found.append(f"{file}:1: the room {room!r} is not in the list")
            continue
        for module, line, early in imports(source, file):
            reason = _reason(file, room, module, early)
            if reason:
                found.append(f"{file}:{line}: {reason}")
    return found


def _reason(file: str, room: str, module: str, early: bool) -> str | None:
    root, *rest = module.split(".")
    if root in OUTSIDE:
        return f"the package imports {root}, which is not in the wheel"
    if root in EXPORT_PACKAGES:
        bare = room in NEEDS_NO_TORCH and early and file not in EXEMPT
        return f"{room} imports {root} when it is imported itself" if bare else None
    if root != "sam_export":
        return None
    if file in ORACLE and not module.startswith("sam_export.parity.oracle"):
        return "the oracle shares no code with the package"
    if not rest:  # the package as its users see it
        return None if RANKS[room] >= RANKS["cli"] else f"{room} imports the whole package"
    other = rest[0]
    if other not in RANKS or other == room:
        return None  # a name of the façade; `import sam_export` was judged by itself
    if RANKS[other] >= RANKS[room]:
        return f"{room} imports {other}, which is not above it"
    return None


def test_rooms_import_only_rooms_above_them() -> None:
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert len(sources) > 30
    assert violations(sources) == []


def test_the_check_finds_what_it_is_for() -> None:
    sources = {
        "artifact/a.py": "import torch\n",
        "artifact/b.py": "def f():\n    import torch\n    from sam_export.step import sam\n",
        "lower/a.py": "import onnx\nfrom ..runtime.session import Session\n",
        "runtime/a.py": "if TYPE_CHECKING:\n    import torch\n    from sam_export import lower\n",
        "runtime/torch_compile.py": "import torch\n",
        "step/a.py": "from sam_export import SAM\nimport models.mlp\n",
        "parity/oracle.py": "from sam_export.errors import ParityError\n",
        "cli/a.py": "import sam_export\nimport sam_export.api\n",
        "shop/a.py": "",
    }
    assert violations(sources) == [
        "artifact/a.py:1: artifact imports torch when it is imported itself",
        "artifact/b.py:3: artifact imports step, which is not above it",
        "lower/a.py:2: lower imports runtime, which is not above it",
        "runtime/a.py:3: runtime imports lower, which is not above it",
        "step/a.py:1: step imports the whole package",
        "step/a.py:2: the package imports models, which is not in the wheel",
        "parity/oracle.py:1: the oracle shares no code with the package",
        "shop/a.py:1: the room 'shop' is not in the list",
    ]
