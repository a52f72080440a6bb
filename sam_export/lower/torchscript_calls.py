"""How the methods of the scripted module are called: their arguments, and checks of these."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sam_export.artifact.contract import BY_EXAMPLES, ProgramSpec, StepContract, TensorSpec
from sam_export.lower.torchscript_source import Names


def reported(spec: ProgramSpec) -> list[TensorSpec]:
    """The outputs of a program that are not new state."""
    return [output for output in spec.outputs if output.name not in spec.feeds]


def arguments_of(contract: StepContract, spec: ProgramSpec) -> tuple[Names, dict[str, str]]:
    """Local names: of the tensors that a program is given (`StepContract.fed`), by their names."""
    names = Names()
    return names, {item.name: names.make(item.name) for item in contract.fed(spec)}


def signature(name: str, arguments: Sequence[str], returns: str) -> str:
    """The first line of a method that takes tensors."""
    listed = "".join(f", {argument}: Tensor" for argument in arguments)
    return f"def {name}(self{listed}) -> {returns}:"


def batch_checks(contract: StepContract, spec: ProgramSpec, arguments: dict[str, str]) -> list[str]:
    """Lines that refuse tensors of another dtype, rank or size.

    Args:
        contract: Dtypes and shapes.
        spec: The program that is given the tensors.
        arguments: Name in the contract to the local name.
    """
    lines: list[str] = []
    where: dict[str, str] = {}
    for item in contract.fed(spec):
        value, rank = arguments[item.name], len(item.shape)
        wrong = [f"{value}.dim() != {rank}", f"{value}.dtype != torch.{item.dtype}"]
        wrong += [
            f"{value}.size({d}) != {n}" for d, n in enumerate(item.shape) if not isinstance(n, str)
        ]
        text = f"batch tensor {item.name!r} is {{}}{{}}; expected {item.description}"
        found = f"self.name_of_dtype({value}), {value}.size()"
        lines += [
            f"if {' or '.join(wrong)}:",
            f"    raise ValueError({json.dumps(text)}.format({found}))",
        ]
        for d, size in enumerate(item.shape):
            if not isinstance(size, str):
                continue
            if size not in where:
                where[size] = f"{value}.size({d})"
                least = contract.dims[size]
                least = least if spec.name in BY_EXAMPLES else min(least, 1)
                text = f"{size} is {{}} in batch tensor {item.name!r}; it must be at least {least}"
                wrong_size = f"{where[size]} < {least}"
                count = contract.multiples.get(size, 1)
                if spec.name in BY_EXAMPLES and count > 1:
                    text += f", and a multiple of {count}"
                    wrong_size += f" or {where[size]} % {count} != 0"
                shown = where[size]
            else:
                text = f"{size} is {{}} in batch tensor {item.name!r}, but {{}} in another"
                wrong_size = f"{value}.size({d}) != {where[size]}"
                shown = f"{value}.size({d}), {where[size]}"
            lines += [
                f"if {wrong_size}:",
                f"    raise ValueError({json.dumps(text)}.format({shown}))",
            ]
    return lines
