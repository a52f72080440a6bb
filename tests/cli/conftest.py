"""A small recipe, its ONNX artifact, and data for it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sam_export.cli import main

RECIPE = """
import torch
import sam_export as sx


def recipe(hidden=8, optimizer="SGD", batches=3):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3)
    )
    keywords = {"SGD": {"momentum": 0.9}, "AdamW": {}}[optimizer]
    sam = sx.SAM(model.parameters(), getattr(torch.optim, optimizer), lr=0.1, **keywords)
    step = sx.TrainStep(model, torch.nn.CrossEntropyLoss(), sam)
    data = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(batches)]
    return step, data


def averaged():
    step, data = recipe()
    sam = sx.SAM(step.model.parameters(), torch.optim.SGD, lr=0.1, every=3, variant=sx.LookSAM())
    return sx.TrainStep(step.model, torch.nn.CrossEntropyLoss(), sam, ema=sx.EMA(0.9)), data


def no_batches():
    return recipe()[0], []


def not_a_step():
    return "step", []


def no_pair():
    return recipe()[0]


def broken():
    return [][0]


def no_parameters():
    return sx.TrainStep(torch.nn.ReLU(), torch.nn.MSELoss(), None), []


not_a_function = 3
"""


@dataclass(frozen=True)
class Workplace:
    """Files that the commands work with.

    Attributes:
        folder: Where they lie.
        recipe: The recipe file.
        artifact: Its ONNX artifact, made by `sam-export export`.
        train: A .npz file of 50 learnable examples.
        test: Another one, of 13.
    """

    folder: Path
    recipe: Path
    artifact: Path
    train: Path
    test: Path


def write_data(path: Path, count: int, seed: int) -> None:
    """Examples of three classes that a linear model can tell apart."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((count, 4)).astype(np.float32)
    np.savez(path, input=x, target=x[:, :3].argmax(axis=1).astype(np.int64))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts of parity checks are kept for one test only: some build wrong ones on purpose."""
    monkeypatch.setenv("SAM_EXPORT_CACHE", str(tmp_path / "parity-cache"))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The files; made once, and not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    place = Workplace(
        folder=folder,
        recipe=folder / "recipes.py",
        artifact=folder / "artifact",
        train=folder / "train.npz",
        test=folder / "test.npz",
    )
    place.recipe.write_text(textwrap.dedent(RECIPE))
    write_data(place.train, 50, seed=1)
    write_data(place.test, 13, seed=2)
    assert main(["export", f"{place.recipe}:recipe", "--out", str(place.artifact)]) == 0
    return place
