"""The loop of `sam-export train`: epochs of steps, validation, metrics, checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_export.cli.console import Progress, progress
from sam_export.cli.errors import CommandError, Interrupted
from sam_export.cli.lr_schedule import LrSchedule
from sam_export.cli.metrics_log import MetricsLog
from sam_export.cli.run_file import RunSettings, write_run
from sam_export.cli.stop import Stop, stop_on_signal
from sam_export.cli.train_data import DataSource
from sam_export.cli.validation import validate

if TYPE_CHECKING:
    from sam_export.runtime.session import Session


@dataclass(frozen=True)
class Epoch:
    """An epoch with steps left to run.

    Attributes:
        index: Its number, from 0.
        batches: The batches that are left.
        done: How many were run before.
        length: How many it has in all; None where that is not known.
    """

    index: int
    batches: Iterator[Any]
    done: int
    length: int | None


@dataclass
class EpochTotals:
    """Sums over the steps of one epoch that were run in this process."""

    steps: int = 0
    not_finite: int = 0
    loss: float = 0.0
    perturbed_loss: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def add(self, loss: float, perturbed_loss: float, finite: bool) -> None:
        """Counts one step; the losses of one that is not finite are left out of the means."""
        self.steps += 1
        self.not_finite += not finite
        if finite:
            self.loss += loss
            self.perturbed_loss += perturbed_loss

    def line(self) -> str:
        """The means and the speed, for a person."""
        counted = self.steps - self.not_finite
        parts = ["no step was finite"]
        if counted:
            parts = [
                f"loss {self.loss / counted:.4f}",
                f"perturbed {self.perturbed_loss / counted:.4f}",
            ]
        if self.not_finite:
            parts.append(f"{self.not_finite} of {self.steps} steps not finite")
        seconds = max(time.monotonic() - self.start, 1e-9)
        return "  ".join([*parts, f"{self.steps / seconds:.1f} steps/s"])


@dataclass(frozen=True)
class TrainLoop:
    """One training run on a session.

    Attributes:
        session: Holds the state; its step count says where the run is.
        settings: Which batch and learning rate each step gets.
        schedule: The learning-rate schedule of the settings.
        data: Training batches.
        validation: Validation batches; None without.
        checkpoint: File to write; None without.
        checkpoint_every: Epochs between two checkpoints.
        log: Takes the metrics of each step; None without.
        resume_hint: Command that continues the run from its checkpoint.
        average: Whether the averaged weights are validated.
    """

    session: Session
    settings: RunSettings
    schedule: LrSchedule
    data: DataSource
    validation: DataSource | None
    checkpoint: Path | None
    checkpoint_every: int
    log: MetricsLog | None
    resume_hint: str
    average: bool = False

    def run(self) -> int:
        """Trains from the session's step count to the end of the last epoch.

        Returns:
            How many steps were run.

        Raises:
            Interrupted: A signal stopped it; the checkpoint is written and what is left was said.
            CommandError: The data has no batches, or does not say how many where that is needed.
            SessionError: A batch does not fit the contract.
        """
        before = self.session.step_count
        with stop_on_signal() as stop:
            for epoch in self._epochs():
                label = f"epoch {epoch.index + 1}/{self.settings.epochs}"
                left = None if epoch.length is None else epoch.length - epoch.done
                with progress(left, label) as bar:
                    totals = self._run_epoch(epoch, bar, stop)
                    if totals.steps and stop.signal is None:
                        bar.message(f"{label}  {totals.line()}{self._validation(epoch.index)}")
                if stop.signal is not None:
                    self._interrupted(epoch, totals.steps, stop.signal)
                number = epoch.index + 1
                if number % self.checkpoint_every == 0 or number == self.settings.epochs:
                    self._save()
        return self.session.step_count - before

    def _epochs(self) -> Iterator[Epoch]:
        done = self.session.step_count
        for index in range(self.settings.epochs):
            batches = self.data.batches(index)
            length = len(batches) if isinstance(batches, Sized) else None
            if length is not None and 0 < length <= done:
                done -= length
                continue
            rest = iter(batches)
            walked = sum(1 for _ in islice(rest, done))
            done -= walked
            if done == 0:  # else it was an epoch of unknown length, and all of it is done
                yield Epoch(index, rest, walked, length)

    def _run_epoch(self, epoch: Epoch, bar: Progress, stop: Stop) -> EpochTotals:
        totals = EpochTotals()
        for position, batch in enumerate(epoch.batches, epoch.done):
            entries = (batch,) if isinstance(batch, Mapping) else tuple(batch)
            result = self.session.step(*entries, **self._hyper(epoch, position))
            metrics = {
                name: float(getattr(result, name))
                for name in ("loss", "perturbed_loss", "grad_norm")
            }
            finite = bool(result.finite)
            totals.add(metrics["loss"], metrics["perturbed_loss"], finite)
            if self.log is not None:
                hyper = {k: v for k, v in self.session.hyper.items() if k in ("lr", "rho")}
                count = self.session.step_count
                self.log.write(count, epoch.index + 1, metrics, hyper, finite)
            bar.advance(f"loss {metrics['loss']:.4f}")
            if stop.signal is not None:
                break
        if totals.steps + epoch.done == 0:
            raise CommandError(f"The data has no batches in epoch {epoch.index + 1}.")
        return totals

    def _hyper(self, epoch: Epoch, position: int) -> dict[str, Any]:
        settings = self.settings
        hyper: dict[str, Any] = {} if settings.rho is None else {"rho": settings.rho}
        if settings.lr is None and settings.lr_schedule == "constant":
            return hyper  # what the artifact or the checkpoint has
        done = float(epoch.index)
        if self.schedule.within_epoch:
            if epoch.length is None:
                raise CommandError(
                    f"--lr-schedule {self.schedule.text} needs the number of steps in an epoch: "
                    "let the --data function return a list, or something with len()."
                )
            done += position / epoch.length
        factor = self.schedule.factor(done, settings.epochs)
        hyper["lr"] = [value * factor for value in self._base_lr()]
        return hyper

    def _base_lr(self) -> Sequence[float]:
        groups = len(self.session.contract.groups)
        if self.settings.lr is not None:
            return [self.settings.lr] * groups
        (defaults,) = (s.defaults for s in self.session.contract.hyper if s.name == "lr")
        return defaults

    def _validation(self, epoch: int) -> str:
        if self.validation is None:
            return ""
        values = validate(self.session, self.validation.batches(epoch), self.average)
        texts = {"loss": "  validation loss {:.4f}", "accuracy": "  accuracy {:.2%}"}
        return "".join(texts[name].format(value) for name, value in values.items())

    def _save(self) -> None:
        if self.log is not None:
            self.log.flush()
        if self.checkpoint is not None:
            write_run(self.checkpoint, self.settings)
            self.session.save(self.checkpoint)

    def _interrupted(self, epoch: Epoch, steps: int, signal: int) -> None:
        self._save()
        length = "?" if epoch.length is None else epoch.length
        print(
            f"interrupted after step {self.session.step_count}: epoch {epoch.index + 1} of "
            f"{self.settings.epochs}, step {epoch.done + steps} of {length} in it",
            file=sys.stderr,
        )
        if self.checkpoint is None:
            print("no --checkpoint was given: the trained state is lost", file=sys.stderr)
        else:
            print(f"saved: {self.checkpoint}", file=sys.stderr)
            print(f"continue with: {self.resume_hint}", file=sys.stderr)
        raise Interrupted(signal)
