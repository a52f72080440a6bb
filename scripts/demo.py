"""The demonstration: one SAM step as one ONNX graph, trained beside eager PyTorch on real digits.

Exports the digits CNN's SAM step, trains it in eager PyTorch and in ONNX Runtime on the same
batches, checks every target against the eager oracle, and leaves in the output folder: the
artifact, the data and final state for a training run without torch, the parity report, a picture;
and the same step as TorchScript, with the data for the C++ programs of `examples/cpp`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import sam_export as sx
from models import digits_cnn
from models.digits import Digits, load_digits
from sam_export.artifact.state_file import write_state
from sam_export.cli.lr_schedule import parse_schedule
from sam_export.cli.train_data import open_source
from sam_export.report.plot import plot_training

SEED = 0
BATCH_SIZE = 64
THREADS = 1
"""A model this small gains nothing from more, and on a busy machine loses much by waiting."""

LR = 0.03
"""Calm enough that rounding does not grow: at 0.1 two eager runs drift apart within 20 steps."""

SCHEDULE = "cosine"
DATA_NAMES = ("train_x", "train_y", "test_x", "test_y")
PARITY_TARGETS = ("torch-compile", "torchscript", "aot-inductor", "onnx")
PARITY_STEPS = 20
REQUIRED_ACCURACY = 0.97


@dataclass
class Trainee:
    """One of the trainings that run side by side.

    Attributes:
        name: For the table and the picture.
        step: Runs one step on (x, y) with the given learning rate.
        predict: Logits of images, in eval mode.
        losses: Loss of every step, at the weights before it.
        step_ms: Milliseconds of every step, until its loss is read.
        accuracy: Share of the test images that are recognised, after the last epoch.
    """

    name: str
    step: Callable[[NDArray[Any], NDArray[Any], float], Any]
    predict: Callable[[NDArray[Any]], NDArray[Any]]
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def train_on(self, x: NDArray[Any], y: NDArray[Any], lr: float) -> None:
        """Runs and times one step."""
        start = time.perf_counter()
        loss = float(self.step(x, y, lr).loss)
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.losses.append(loss)

    def test(self, digits: Digits) -> None:
        """Measures the accuracy on the test set."""
        right = self.predict(digits.test_x).argmax(axis=1) == digits.test_y
        self.accuracy = float(right.mean())


def eager_trainee(train_step: sx.TrainStep) -> Trainee:
    """Eager PyTorch: two passes through the model, one after the other."""
    model, optimizer = train_step.model, train_step.optimizer

    def step(x: NDArray[Any], y: NDArray[Any], lr: float) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = lr
        return train_step(torch.from_numpy(x), torch.from_numpy(y))

    def predict(x: NDArray[Any]) -> NDArray[Any]:
        model.eval()
        with torch.no_grad():
            logits: NDArray[Any] = model(torch.from_numpy(x)).numpy()
        model.train()
        return logits

    return Trainee("eager PyTorch", step, predict)


def session_trainee(session: sx.Session) -> Trainee:
    """The artifact, run by ONNX Runtime."""
    return Trainee(
        "ONNX Runtime", lambda x, y, lr: session.step(x, y, lr=lr), lambda x: session.evaluate(x)
    )


def write_data(out: Path, digits: Digits, session: sx.Session) -> tuple[Path, Path]:
    """Writes training and test set under the names that the artifact gives its batch."""
    x, y = (spec.name for spec in session.contract.batch)
    train, test = out / "digits_train.npz", out / "digits_test.npz"
    sets: dict[Path, dict[str, Any]] = {
        train: {x: digits.train_x, y: digits.train_y},
        test: {x: digits.test_x, y: digits.test_y},
    }
    for path, arrays in sets.items():
        np.savez(path, **arrays)
    write_state(out / "digits.safetensors", {name: getattr(digits, name) for name in DATA_NAMES})
    return train, test


def train_side_by_side(
    trainees: list[Trainee], session: sx.Session, data: Path, digits: Digits, epochs: int
) -> None:
    """Trains all on the same batches with the same learning rates.

    Order of the data and schedule are those of ``sam-export train``, so that the command printed
    at the end repeats the ONNX Runtime training exactly.
    """
    source = open_source(str(data), session.contract, BATCH_SIZE, SEED, training=True)
    schedule = parse_schedule(SCHEDULE)
    for epoch in range(epochs):
        batches: list[Any] = list(source.batches(epoch))
        for index, (x, y) in enumerate(batches):
            lr = LR * schedule.factor(epoch + index / len(batches), epochs)
            for trainee in trainees:
                trainee.train_on(x, y, lr)
        parts = []
        for trainee in trainees:
            trainee.test(digits)
            loss = sum(trainee.losses[-len(batches) :]) / len(batches)
            parts.append(f"{trainee.name} loss {loss:.6f} accuracy {trainee.accuracy:.2%}")
        print(f"  epoch {epoch + 1}/{epochs}: " + "; ".join(parts), flush=True)


def check(out: Path) -> sx.ParityReport:
    """The parity check from the initial weights; the last batch is a smaller one.

    The first batches are not taken: in the second step from these weights one ReLU gets 4.5e-7,
    less than float32 rounds a BatchNorm's output by, so that its gradient may be on or off.
    """
    train_step, batches = digits_cnn.recipe(SEED, BATCH_SIZE, lr=LR, num_batches=1000)
    chosen = [*batches[7:14], batches[-1]]
    report = sx.check_parity(
        train_step, chosen, targets=list(PARITY_TARGETS), num_steps=PARITY_STEPS
    )
    report.to_json(out / "parity.json")
    return report


def table(trainees: list[Trainee], report: sx.ParityReport) -> str:
    """Losses, accuracies, step times, and the verdict on each target."""
    lines = [
        f"{'':<16}{'first loss':>12}{'last loss':>12}{'accuracy':>10}{'ms / step':>11}",
        *(
            f"{item.name:<16}{item.losses[0]:>12.7f}{item.losses[-1]:>12.7f}"
            f"{item.accuracy:>10.2%}{median(item.step_ms):>11.2f}"
            for item in trainees
        ),
        f"(medians, {THREADS} thread each, in one process; scripts/bench compares with care)",
        "",
        *(
            f"parity of {target.name:<16} {'OK' if target.ok else 'FAILED'}"
            for target in report.targets
        ),
    ]
    return "\n".join(lines)


def train_command(artifact: Path, train: Path, test: Path, epochs: int) -> str:
    """The command that repeats the ONNX Runtime training where there is no torch."""
    parts = ["sam-export", "train", artifact, "--data", train, "--validate", test]
    parts += ["--epochs", epochs, "--batch-size", BATCH_SIZE, "--lr", LR]
    parts += ["--lr-schedule", SCHEDULE, "--seed", SEED, "--threads", THREADS]
    parts += ["--save-state", artifact.parent / "trained.safetensors"]
    return shlex.join(map(str, parts))


def main(argv: list[str] | None = None) -> int:
    """Runs the demonstration; returns 1 when accuracy or parity fails."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="output folder")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of training (default: 8)")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be 1 or more")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(THREADS)

    print("exporting the digits CNN's SAM step to ONNX ...", flush=True)
    train_step, batches = digits_cnn.recipe(SEED, BATCH_SIZE, lr=LR)
    captured = sx.capture(train_step, batches[0])
    sx.export(captured, out / "onnx", target="onnx", overwrite=True)
    sx.export(captured, out / "torchscript", target="torchscript", overwrite=True)
    session = sx.load(out / "onnx", threads=THREADS)
    digits = load_digits(SEED)
    train, test = write_data(out, digits, session)

    print(f"training on {len(digits.train_x)} digits, side by side ...", flush=True)
    trainees = [eager_trainee(train_step), session_trainee(session)]
    train_side_by_side(trainees, session, train, digits, options.epochs)
    write_state(out / "final_state.safetensors", session.state)

    print(f"checking parity over {PARITY_STEPS} steps (compiling takes a while) ...", flush=True)
    report = check(out)
    print(f"\n{report}\n\n{table(trainees, report)}\n")
    picture = plot_training(
        {item.name: item.losses for item in trainees},
        {item.name: item.free_running for item in report.targets if item.free_running},
        report.tolerances.drift,
        out / "demo.png",
    )
    print(f"picture:  {picture}\nartifact: {out / 'onnx'}\nreport:   {out / 'parity.json'}\n")
    print("The same training without torch (NumPy, safetensors and ONNX Runtime are enough):\n")
    print(f"  {train_command(out / 'onnx', train, test, options.epochs)}\n")
    print(f"ends with the state in {out / 'final_state.safetensors'}.\n")
    print(f"In C++, from {out / 'torchscript'}: see examples/cpp/README.md.")

    weak = [item.name for item in trainees if item.accuracy <= REQUIRED_ACCURACY]
    for name in weak:
        print(f"error: {name} stays at or below {REQUIRED_ACCURACY:.0%}", file=sys.stderr)
    if not report.ok:
        print("error: the parity check failed (see above)", file=sys.stderr)
    return 1 if weak or not report.ok else 0


if __name__ == "__main__":
    sys.exit(main())
