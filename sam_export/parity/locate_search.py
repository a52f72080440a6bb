"""The first node whose output differs, by bisection over pieces of the graph.

The values that eager and the target have in common, in order, cut the graph into pieces. A piece
gets eager's values of all that comes before it, so it differs only by what is wrong inside it, and
nothing piles up. A piece that differs is halved: the first half that differs goes on. For ``n``
values that is about ``2 log2(n)`` pieces, and at most ``2 n`` nodes run in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from sam_export.parity.interpret import StepGraph
from sam_export.parity.locate_judge import Gap, Moved, gaps
from sam_export.parity.tolerances import Tolerances


class Form(Protocol):
    """A step in a target's form, of which pieces can be run.

    Attributes:
        values: Names of the nodes of the captured graph whose values it has, too.
        ways: Ways to run a piece, each with one more part of the runtime at work; the target's own
            is the last.
    """

    @property
    def values(self) -> Sequence[str]: ...

    @property
    def ways(self) -> Sequence[str]: ...

    def run(
        self, wanted: Sequence[str], given: Mapping[str, Tensor], way: str = ""
    ) -> dict[str, NDArray[Any]]:
        """The values ``wanted``, computed from those of ``given``; the target's way by default."""
        ...

    def readers(self, name: str, known: Callable[[str], bool]) -> set[str]:
        """The values of which ``known`` is true that are computed from ``name`` directly."""
        ...


@dataclass(frozen=True)
class Piece:
    """Part of a graph.

    Attributes:
        wanted: Nodes whose values come out of it.
        given: Eager's values of all that comes before it, by node name.
        gaps: Those of the values that differ, worst first; empty where none does.
        span: Names of the common values that it computes.
    """

    wanted: tuple[str, ...]
    given: Mapping[str, Tensor]
    gaps: tuple[Gap, ...]
    span: tuple[str, ...]


@dataclass
class Search:
    """Bisects the step of one target.

    Args:
        graph: The captured step with eager's values.
        form: The target's form of it.
        tol: The numbers that decide.
        whole_first: Whether the whole graph is run before its halves: not where that is expensive.

    Attributes:
        runs: How many pieces ran.
        harmless: Values that differ though nothing that reads them does: the target writes them
            in another way (an index, a mask), and the next one agrees.
        retests_whole: Whether what differs is run again with all that was computed with it: where
            another graph would have to be compiled.
    """

    graph: StepGraph
    form: Form
    tol: Tolerances
    whole_first: bool = True
    runs: int = 0
    harmless: list[str] = field(default_factory=list)
    retests_whole: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        results = self.graph.results
        dropped = set() if self.graph.is_finite else set(self.graph.spec.feeds)
        self._ends = {node for output, node in results.items() if output not in dropped}
        common = set(self.form.values) - self.graph.sources
        self._set(sorted(common, key=self.graph.place.__getitem__))

    def find(self) -> Piece | None:
        """The smallest piece that differs, as early as there is one; None where none does."""
        while True:
            piece = self._first()
            if piece is None or len(piece.span) > 1 or piece.span[0] in self._ends:
                return piece
            if not self._is_harmless(piece.span[0]):
                return piece
            self.harmless.append(piece.span[0])
            self._set([name for name in self._values if name != piece.span[0]])

    # -- bisection --------------------------------------------------------------------------------

    def _set(self, values: list[str]) -> None:
        self._values = values
        self._places = {name: place for place, name in enumerate(values)}
        self._tested: dict[tuple[int, int], Piece] = {}
        self._last: dict[str, int] = {}

    def _first(self) -> Piece | None:
        end = len(self._values)
        if self.whole_first and not self._piece(0, end).gaps:
            return None
        found = self._halved(0, end)
        if found is None and self._piece(0, end).gaps:
            found = self._shrunk(0, end)
        return found

    def _halved(self, begin: int, end: int) -> Piece | None:
        """Goes down into the first half that differs; None where neither does."""
        if end - begin < 2:
            return self._piece(begin, end)
        middle = (begin + end) // 2
        for half in ((begin, middle), (middle, end)):
            piece = self._piece(*half)
            if piece.gaps:
                return self._halved(*half) or self._shrunk(*half)
        return None

    def _shrunk(self, begin: int, end: int) -> Piece:
        """The smallest piece that differs of one whose halves agree: only together they differ.

        Such is a fusion of the target, or rounding that adds up.
        """
        low, high = begin, end
        while high - low > 1:  # the latest begin that still differs
            middle = (low + high) // 2
            low, high = (middle, high) if self._piece(middle, end).gaps else (low, middle)
        begin, (low, high) = low, (begin, end)
        low = begin
        while high - low > 1:  # and then the earliest end
            middle = (low + high) // 2
            low, high = (low, middle) if self._piece(begin, middle).gaps else (middle, high)
        return self._piece(begin, high)

    def _piece(self, begin: int, end: int) -> Piece:
        if (begin, end) not in self._tested:
            span = self._values[begin:end]
            wanted = [v for v in span if v in self._ends or self._last_read(v) >= end]
            given = self._given(self._values[:begin])
            self._tested[begin, end] = self._run(wanted, given, span)
        return self._tested[begin, end]

    def _given(self, names: Iterable[str]) -> dict[str, Tensor]:
        values = self.graph.values
        return {name: values[name] for name in (*self.graph.sources, *names) if name in values}

    def _last_read(self, name: str) -> int:
        if name not in self._last:
            places = [self._places[reader] for reader in self._readers(name)]
            self._last[name] = max(places, default=-1)
        return self._last[name]

    def _readers(self, name: str) -> set[str]:
        def known(other: str) -> bool:
            return other in self._places

        return direct_readers(name, self.graph.users, known) | self.form.readers(name, known)

    # -- one piece --------------------------------------------------------------------------------

    def _run(
        self, wanted: Sequence[str], given: Mapping[str, Tensor], span: Sequence[str]
    ) -> Piece:
        over = self._over(wanted, given) if wanted else []
        suspects = {gap.name for gap in over}
        # A decision that rounding tips (ReLU, a maximum) is gone when its inputs move; a fault not.
        for attempt in range(self.tol.retests):
            if not suspects:
                break
            moved = Moved(given, self.tol.nudge, 100 + attempt)
            again = wanted if self.retests_whole else sorted(suspects)
            suspects &= {gap.name for gap in self._over(again, moved)}
        kept = sorted((g for g in over if g.name in suspects), key=lambda gap: -_badness(gap))
        return Piece(tuple(wanted), given, tuple(kept), tuple(span))

    def _over(self, wanted: Sequence[str], given: Mapping[str, Tensor]) -> list[Gap]:
        self.runs += 1
        found = self.form.run(wanted, given)
        return [gap for gap in gaps(self.graph, given, found, self.tol) if gap.is_over]

    def _is_harmless(self, name: str) -> bool:
        """Whether what reads a value agrees with eager where the target computes the value itself.

        The target then writes the value in another way on purpose, and reads it in that way.
        """
        readers = self._readers(name)
        if not readers:
            return False
        others = [v for v in self._values if v != name and v not in readers]
        wanted = sorted(readers, key=self._places.__getitem__)
        return not self._run(wanted, self._given(others), wanted).gaps


def direct_readers(
    name: str, users: Callable[[str], Iterable[str]], known: Callable[[str], bool]
) -> set[str]:
    """What is known and reads ``name``, directly or through what is not known."""
    found: set[str] = set()
    seen: set[str] = set()
    pending = list(users(name))
    while pending:
        user = pending.pop()
        if known(user):
            found.add(user)
        elif user not in seen:
            seen.add(user)
            pending.extend(users(user))
    return found


def _badness(gap: Gap) -> float:
    return gap.error / gap.bound if gap.bound else float("inf")
