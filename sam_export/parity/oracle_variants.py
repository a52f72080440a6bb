"""Variants of the oracle's step. It imports nothing of this package, on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups of a stock optimizer."""

Named = Sequence[tuple[str, Tensor]]
"""Parameters that have a gradient."""


def other_perturbation(
    model: nn.Module,
    groups: Groups,
    radius: str,
    perturbation: Callable[..., Mapping[str, Tensor]] | None,
    adaptive: float | None,
    ascent_steps: int = 1,
) -> Mapping[str, Tensor] | None:
    """``eps`` by name, of another kind than SAM's; None where it is SAM's.

    Args:
        model: With gradients.
        groups: Of the optimizer.
        radius: Under which key a group holds its radius.
        perturbation: The user's own function of (parameters, gradients, radii).
        adaptive: For adaptive SAM: its ``eta``. With ``t = |w| + eta``: ``rho t^2 g / ||t g||``.
        ascent_steps: How many steps share the radius.

    Source: Kwon, Kim, Park, Choi, 2021, https://arxiv.org/abs/2102.11600, eq. 11.
    """
    if perturbation is None and adaptive is None:
        return None
    radius_of = {p: group[radius] / ascent_steps for group in groups for p in group["params"]}
    held = {
        name: p for name, p in model.named_parameters() if p.grad is not None and p in radius_of
    }
    w = {name: p.detach() for name, p in held.items()}
    g = {name: p.grad for name, p in held.items() if p.grad is not None}
    rho = {name: torch.tensor(radius_of[p], dtype=torch.float64) for name, p in held.items()}
    if perturbation is not None:
        return perturbation(w, g, rho)
    assert adaptive is not None
    t = {name: value.abs() + adaptive for name, value in w.items()}
    norm = torch.cat([(t[name] * g[name]).flatten() for name in held]).norm() + 1e-12
    return {name: rho[name] * t[name] ** 2 * g[name] / norm for name in held}


class OracleVariant:
    """GSAM, Friendly SAM and LookSAM, written down once more; without a name, SAM itself.

    Args:
        name: Name of the class of the variant.
        **numbers: Its arguments.

    Attributes:
        kept: What it keeps from step to step: key -> parameter name -> tensor.
    """

    def __init__(self, name: str = "", **numbers: float) -> None:
        self.name, self.numbers = name, numbers
        self.kept: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def ascend(self, named: Named) -> None:
        """Makes the gradients what is ascended: Friendly SAM takes the average away."""
        if self.name != "FriendlySAM":
            return
        averages = self.kept.setdefault("average", {})
        stays = self.numbers["lmbda"]
        is_first = not averages
        for name, p in named:
            assert p.grad is not None
            g = p.grad.clone()
            if is_first:
                averages[name] = g
            else:
                p.grad = g - self.numbers["sigma"] * averages[name]
                averages[name] = stays * averages[name] + (1 - stays) * g

    @torch.no_grad()
    def descend(self, named: Named, g: Mapping[str, Tensor]) -> None:
        """Makes the gradients what the base optimizer gets; ``g`` are those at ``w``."""
        if self.name not in ("GSAM", "LookSAM"):
            return
        adversarial = {name: p.grad for name, p in named if p.grad is not None}
        dot = torch.stack([(g[name] * v).sum() for name, v in adversarial.items()]).sum()
        if self.name == "GSAM":
            square = (_length(adversarial.values()) + 1e-12) ** 2
            for name, p in named:
                along = dot / square * adversarial[name]
                p.grad = adversarial[name] - self.numbers["alpha"] * (g[name] - along)
        else:
            square = (_length(g.values()) + 1e-12) ** 2
            self.kept["flattening"] = {
                name: v - dot / square * g[name] for name, v in adversarial.items()
            }

    @torch.no_grad()
    def between(self, named: Named) -> None:
        """The same for a step without a perturbation: LookSAM adds what it has kept."""
        kept = self.kept.get("flattening", {})
        if not kept:
            return
        length = _length([p.grad for _, p in named if p.grad is not None])
        scale = self.numbers["alpha"] * length / (_length(kept.values()) + 1e-12)
        for name, p in named:
            assert p.grad is not None
            p.grad += scale * kept[name]

    def copy_of_kept(self) -> dict[str, dict[str, Tensor]]:
        """What is kept now, for a step that may come to nothing."""
        return {key: dict(values) for key, values in self.kept.items()}

    def double(self) -> None:
        """Goes on in float64."""
        self.kept = {
            key: {name: value.double() for name, value in values.items()}
            for key, values in self.kept.items()
        }

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """What is kept, as ``memory.<key>.<parameter>``; nothing before the first step."""
        return {
            f"memory.{key}.{name}": value.detach().cpu().numpy().copy()
            for key, values in self.kept.items()
            for name, value in values.items()
        }

    def load(self, state: Mapping[str, NDArray[Any]], device: torch.device, double: bool) -> None:
        """The inverse."""
        self.kept = {}
        for full, array in state.items():
            if full.startswith("memory."):
                _, key, name = full.split(".", 2)
                value = torch.tensor(array, device=device)
                self.kept.setdefault(key, {})[name] = value.double() if double else value


def _length(tensors: Iterable[Tensor]) -> Tensor:
    """One L2 norm over all."""
    length: Tensor = torch.stack([value.norm() for value in tensors]).norm()
    return length


def clip(groups: Groups, norm: float | None, value: float | None) -> None:
    """Clips the gradients by value, then by their norm, with torch's own functions."""
    held = [p for group in groups for p in group["params"]]
    if value is not None:
        torch.nn.utils.clip_grad_value_(held, value, foreach=False)
    if norm is not None:
        torch.nn.utils.clip_grad_norm_(held, norm, foreach=False)
