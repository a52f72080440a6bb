"""What the benchmark measured, and what may be concluded from it: plain numbers, no processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

MIN_CPU_SHARE = 0.9
"""A round in which the process got less of the machine than this says nothing about its speed."""


@dataclass(frozen=True)
class Round:
    """One timed run of several steps.

    Attributes:
        steps: Number of steps.
        wall_s: Seconds by the wall clock, all steps together.
        cpu_s: CPU seconds of the process in that time, all threads together.
        device_s: Seconds by CUDA events; None on the CPU.
    """

    steps: int
    wall_s: float
    cpu_s: float
    device_s: float | None = None

    def counts(self, threads: int) -> bool:
        """Whether the process had the machine to itself: CPU time >= 90 % of wall x threads.

        A process that waits for a GPU takes little CPU time, so each of its rounds counts.
        """
        return self.device_s is not None or self.cpu_s >= MIN_CPU_SHARE * self.wall_s * threads

    @property
    def step_ms(self) -> float:
        """Milliseconds per step, by the device's clock where there is one."""
        seconds = self.wall_s if self.device_s is None else self.device_s
        return 1e3 * seconds / self.steps


@dataclass
class Record:
    """One contestant on one case.

    Attributes:
        contestant: Its name.
        threads: Threads it was given.
        start_s: Seconds from starting the process until its first steps were done.
        build_s: Part of these for building or loading and the first steps, without imports.
        export_s: Seconds the parent took to capture and export the artifact; None without one.
        memory_before: Bytes resident after the imports, before anything was built.
        memory_built: Bytes resident between building and warm-up, while no step runs.
        peak: Largest number of bytes resident during warm-up and rounds.
        losses: Losses of the first steps.
        rounds: The timed rounds, in order.
        waits: Calls per step that wait for the device, by name; None where it was not looked at.
        error: Why there are no numbers; None where there are.
    """

    contestant: str
    threads: int
    start_s: float = 0.0
    build_s: float = 0.0
    export_s: float | None = None
    memory_before: int = 0
    memory_built: int = 0
    peak: int = 0
    losses: list[float] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    waits: dict[str, float] | None = None
    error: str | None = None

    @property
    def counted(self) -> list[Round]:
        """The rounds that count."""
        return [item for item in self.rounds if item.counts(self.threads)]

    @property
    def step_ms(self) -> float | None:
        """Median milliseconds per step over the counted rounds; None when no round counts."""
        times = [item.step_ms for item in self.counted]
        return median(times) if times else None

    @property
    def spread_ms(self) -> tuple[float, float] | None:
        """Fastest and slowest counted round, milliseconds per step."""
        times = [item.step_ms for item in self.counted]
        return (min(times), max(times)) if times else None

    @property
    def working_memory(self) -> int:
        """Peak over what the imports had taken already, in bytes."""
        return self.peak - self.memory_before


def wants_more(records: list[Record], rounds: int, max_rounds: int) -> bool:
    """Whether another round is due: some contestant has fewer than ``rounds`` that count."""
    alive = [record for record in records if record.error is None]
    return any(len(record.counted) < rounds and len(record.rounds) < max_rounds for record in alive)


def ratio(value: float | None, reference: float | None) -> float | None:
    """``value / reference``; None when either is missing."""
    return None if value is None or not reference else value / reference


def steps_per_round(step_s: float, seconds: float) -> int:
    """How many steps make a round of about ``seconds``, one at least."""
    return max(1, round(seconds / step_s))


def loss_disagreements(
    records: list[Record], reference: Record, sam: set[str], tolerance: float = 1e-3
) -> list[str]:
    """Contestants whose first losses differ from the reference's: they do other work.

    The first loss is the model's at the initial weights, the same for all; the second one follows
    a step, so it is compared among the SAM contestants only.
    """
    messages = []
    for record in records:
        if record.error is not None:
            continue
        count = len(reference.losses) if record.contestant in sam else 1
        pairs = list(zip(record.losses[:count], reference.losses[:count], strict=True))
        if any(not abs(ours - theirs) <= tolerance * abs(theirs) for ours, theirs in pairs):
            messages.append(
                f"{record.contestant}: first losses {record.losses}, "
                f"{reference.contestant} has {reference.losses}"
            )
    return messages
