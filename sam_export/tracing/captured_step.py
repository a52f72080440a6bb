"""What `capture` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from sam_export.artifact.contract import StepContract
from sam_export.artifact.semantics import Semantics


@dataclass(frozen=True)
class BaseOptimizer:
    """The base optimizer whose update a captured step holds.

    Attributes:
        kind: Its class.
        groups: The options of each parameter group (``betas``, ``weight_decay``) as they were.
    """

    kind: type[torch.optim.Optimizer]
    groups: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class CapturedStep:
    """Named programs over one state, each one functional ATen graph, and their contract.

    Attributes:
        contract: Names, order, roles, dtypes and shapes of all inputs and outputs.
        semantics: What the step means.
        programs: Name (``step``, ``evaluate``, ``evaluate_loss``) to exported program. Inputs and
            outputs are flat and in the order of the contract; no operator mutates anything.
        state: Initial value of every state tensor, in the contract's dtypes.
        random_ops: Random operators in ``step``, by ATen name; empty for a deterministic step.
        portable: Whether operators are kept to those that every target can express.
        base_optimizer: What the update was traced from.
    """

    contract: StepContract
    semantics: Semantics
    programs: dict[str, torch.export.ExportedProgram]
    state: dict[str, NDArray[Any]]
    random_ops: tuple[str, ...]
    portable: bool
    base_optimizer: BaseOptimizer

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name}: {len(program.graph.nodes)} nodes" for name, program in self.programs.items()
        )
        return f"CapturedStep({self.contract.optimizer}; {sizes})"
