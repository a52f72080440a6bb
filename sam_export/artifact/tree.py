"""Structure of a model's output (tensor, tuple, list, dict, nested) as JSON, without torch.

A leaf is ``None`` (no value) or ``"tensor"``; a tuple or list is ``{"tuple": [...]}`` or
``{"list": [...]}``; a mapping is ``{"dict": {key: ...}}``. Leaves are counted in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sam_export.errors import StepConfigError


def flatten(value: Any, path: str = "output") -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of ``value`` as (name, leaf) in order, and its structure.

    Args:
        value: A tensor (anything with ``shape`` and ``dtype``), None, or tuples, lists and mappings
            with string keys of these.
        path: Name of the root; children are ``<path>.<index or key>``.

    Raises:
        StepConfigError: A leaf is neither a tensor nor None.
    """
    if value is None:
        return [], None
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return [(path, value)], "tensor"
    if isinstance(value, Mapping):
        parts = {str(key): flatten(item, f"{path}.{key}") for key, item in value.items()}
        leaves = [leaf for part, _ in parts.values() for leaf in part]
        return leaves, {"dict": {key: tree for key, (_, tree) in parts.items()}}
    if isinstance(value, (tuple, list)):
        children = [flatten(item, f"{path}.{index}") for index, item in enumerate(value)]
        kind = "list" if isinstance(value, list) else "tuple"
        return [leaf for part, _ in children for leaf in part], {
            kind: [tree for _, tree in children]
        }
    raise StepConfigError(
        f"The model's {path} is a {type(value).__name__}; expected a tensor, or a tuple, list or "
        "dict of tensors. Return tensors only."
    )


def unflatten(tree: Any, leaves: Sequence[Any]) -> Any:
    """Puts ``leaves`` back into the structure ``tree``; the inverse of `flatten`."""
    return _build(tree, iter(leaves))


def _build(tree: Any, leaves: Iterator[Any]) -> Any:
    if tree is None:
        return None
    if tree == "tensor":
        return next(leaves)
    (kind, items), *_ = tree.items()
    if kind == "dict":
        return {key: _build(item, leaves) for key, item in items.items()}
    built = [_build(item, leaves) for item in items]
    return tuple(built) if kind == "tuple" else built
