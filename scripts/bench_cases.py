"""What the benchmark trains: a model, its real or random batches, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    import sam_export as sx

RHO = 0.05
OPTIMIZER = "sgd"
"""Key of `models.optimizers.BASE_OPTIMIZERS`: SGD with momentum and weight decay."""

SEED = 0


@dataclass(frozen=True)
class Case:
    """One model with one batch size.

    Attributes:
        name: As in ``--models`` and in the table.
        description: For people.
        recipe: Makes the SAM step and its batches, for the export.
        model: Makes the same model, with the same initial weights, and nothing else.
        loss: Makes the loss, a function of output and target.
        draws: Whether it draws random numbers: eager loops then draw others, so their losses are
            not those of a session, and it is for `scripts.bench_draws` alone.
    """

    name: str
    description: str
    recipe: Callable[[], tuple[sx.TrainStep, list[tuple[Any, Any]]]]
    model: Callable[[], nn.Module]
    loss: Callable[[], Any] = lambda: _cross_entropy()
    draws: bool = False


# Imports are deferred so that a contestant without torch can read the table of cases.
def _digits_cnn(name: str, batch_size: int) -> Case:
    def recipe() -> Any:
        from models import digits_cnn

        return digits_cnn.recipe(SEED, batch_size, optimizer=OPTIMIZER, rho=RHO)

    def model() -> nn.Module:
        from models.digits_cnn import DigitsCNN

        return _seeded(DigitsCNN)

    return Case(name, f"digits CNN, 1x8x8, batch {batch_size}", recipe, model)


def _mlp(name: str, description: str, hidden: tuple[int, ...]) -> Case:
    def recipe() -> Any:
        from models import mlp

        return mlp.recipe(SEED, 64, optimizer=OPTIMIZER, rho=RHO, hidden=hidden)

    def model() -> nn.Module:
        from models.mlp import MLP

        return _seeded(lambda: MLP(hidden=hidden))

    return Case(name, description, recipe, model)


def _wide_resnet(
    name: str, dropout: float = 0.0, depth: int = 16, width: int = 4, batch_size: int = 32
) -> Case:
    options: dict[str, Any] = {"depth": depth, "width": width, "dropout": dropout}

    def recipe() -> Any:
        from models import wide_resnet

        return wide_resnet.recipe(
            SEED, batch_size, optimizer=OPTIMIZER, rho=RHO, num_batches=4, **options
        )

    def model() -> nn.Module:
        from models.wide_resnet import WideResNet

        return _seeded(lambda: WideResNet(**options))

    description = f"WRN-{depth}-{width}{_with(dropout)}, 3x32x32, batch {batch_size}"
    return Case(name, description, recipe, model, draws=dropout > 0)


def _gpt(name: str, dropout: float) -> Case:
    def recipe() -> Any:
        from models import gpt

        return gpt.recipe(SEED, 12, optimizer=OPTIMIZER, rho=RHO, dropout=dropout)

    def model() -> nn.Module:
        from models import gpt

        return _seeded(lambda: gpt.GPT(gpt.characters()[1], dropout=dropout))

    def loss() -> Any:
        from models.gpt import next_token_loss

        return next_token_loss

    description = f"GPT, 4 layers of 128, context 64{_with(dropout)}, batch 12"
    return Case(name, description, recipe, model, loss, draws=dropout > 0)


def _vit(name: str, dropout: float) -> Case:
    options = {"dropout": dropout, "drop_path": dropout}

    def recipe() -> Any:
        from models import vit

        return vit.recipe(SEED, 32, optimizer=OPTIMIZER, rho=RHO, **options)

    def model() -> nn.Module:
        from models.vit import ViT

        return _seeded(lambda: ViT(**options))

    description = f"ViT, 4 blocks of 64, 16 tokens{_with(dropout)}, batch 32"
    return Case(name, description, recipe, model, draws=dropout > 0)


def _with(dropout: float) -> str:
    return f", dropout {dropout:g}" if dropout else ""


def _cross_entropy() -> Any:
    import torch

    return torch.nn.CrossEntropyLoss()


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    import torch

    torch.manual_seed(SEED)
    return make()


CASES = {
    case.name: case
    for case in (
        _mlp("mlp", "MLP 64-512-512-10, batch 64", (512, 512)),
        _digits_cnn("digits_cnn", 64),
        _digits_cnn("digits_cnn_32", 32),
        _wide_resnet("wide_resnet"),
        _wide_resnet("wide_resnet_dropout", 0.3),
        _wide_resnet("wide_resnet_28_10", depth=28, width=10, batch_size=128),
        _vit("vit", 0.0),
        _vit("vit_dropout", 0.1),
        _gpt("gpt", 0.0),
        _gpt("gpt_dropout", 0.1),
        _mlp(
            "mlp_2048",
            "MLP 64-2048x8-10, batch 64: weights outweigh all else, so peak memory shows copies",
            (2048,) * 8,
        ),
    )
}

DEFAULT_CASES = ("mlp", "digits_cnn", "digits_cnn_32", "wide_resnet")
