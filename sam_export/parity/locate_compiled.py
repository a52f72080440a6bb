"""The first node that differs, where each piece has to be compiled: small parts before large ones.

Halving the graph compiles it twice over, and one compilation of 3,000 nodes takes Inductor a minute
and a half. Most faults are in one operator. So the order is:

1. every node alone, those of one kind compiled once (`locate_screen`);
2. windows of consecutive nodes, which compiles each node once;
3. the whole graph, unless its session was seen to differ: if it agrees, there is nothing to find;
4. windows over the borders of those;
5. halves, as `locate_search` does it: the way that always ends, and takes longest.

A node that 1 suspects is compiled again by itself and in the middle of its neighbours, and counts
only if it differs in both: what differs in a company of strangers only is no fault of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sam_export.parity.locate_screen import Screen
from sam_export.parity.locate_search import Piece, Search
from sam_export.parity.locate_torch import TorchForm

_AROUND = 12
"""Values before and after a suspect that are compiled with it: some layers, in a few seconds."""

_WINDOW = 128
"""Values in a window; with those over the borders, every 64 in a row are in one as a whole."""


@dataclass
class CompiledSearch(Search):
    """As `Search`, for a form whose pieces take long to compile.

    Args:
        graph: The captured step with eager's values.
        form: The target's form of it, a `TorchForm`.
        tol: The numbers that decide.
        whole_first: Whether the whole graph is run before what is left when no window differs: not
            where the session was seen to differ.
        differing: Nodes of the outputs that differ in the session; empty if that is not known.
    """

    differing: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.form, TorchForm)
        self._screen = Screen(self.graph, self.form, self.tol)
        self._suspects: list[str] | None = None
        self.retests_whole = True

    def _first(self) -> Piece | None:
        piece = self._alone()
        if piece is not None:
            explained = self._reaches(piece.span[0], all)
            end = 0 if explained else self._places[piece.span[0]]
            return self._in_windows(0, end) or self._in_windows(_WINDOW // 2, end) or piece
        end = len(self._values)
        piece = self._in_windows(0, end)
        if piece is not None:
            return piece
        if self.whole_first and not self._piece(0, end).gaps:
            return None
        return self._in_windows(_WINDOW // 2, end) or super()._first()

    # -- single nodes -----------------------------------------------------------------------------

    def _alone(self) -> Piece | None:
        """The first node that differs by itself and among its neighbours."""
        if self._suspects is None:
            self._suspects = self._screen.differing(self._values)
            self.runs += self._screen.runs
        for name in self._suspects:
            if name not in self._places or not self._reaches(name, any):
                continue
            piece = self._piece(self._places[name], self._places[name] + 1)
            if piece.gaps and self._differs_in_company(name):
                return piece
        return None

    def _differs_in_company(self, name: str) -> bool:
        """Whether a value differs as its neighbours are compiled with it, too."""
        place = self._places[name]
        begin, end = max(0, place - _AROUND), min(len(self._values), place + _AROUND + 1)
        span = self._values[begin:end]
        wanted = [v for v in span if v == name or v in self._ends or self._last_read(v) >= end]
        piece = self._run(wanted, self._given(self._values[:begin]), span)
        return any(gap.name == name for gap in piece.gaps)

    def _reaches(self, name: str, how: Callable[[Iterator[bool]], bool]) -> bool:
        """Whether all (or any) of the outputs that differ are computed from a value."""
        if not self.differing:
            return True
        seen = {name}
        pending = [name]
        while pending:
            for user in self.graph.users(pending.pop()):
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
        return how(output in seen for output in self.differing)

    # -- windows ----------------------------------------------------------------------------------

    def _in_windows(self, begin: int, end: int) -> Piece | None:
        """What differs in the first window from ``begin`` to ``end`` that does."""
        for first in range(begin, end, _WINDOW):
            window = (first, min(first + _WINDOW, end))
            if self._piece(*window).gaps:
                return self._halved(*window) or self._shrunk(*window)
        return None
