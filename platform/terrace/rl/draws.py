"""One prompt after another as a stream begins them: drawn in the stage's order, read ahead, this rank's alone."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from terrace.rl.prompts import Drawn, PromptOrder, PromptReader
from terrace.rl.stream import Begun
from terrace.worker.context import WorkerContext

AHEAD = 8  # prompts that are read before they are asked for


class Draws:
    """Draws `first`, `first + 1`, ... up to `last` (not included); every world_size-th is this rank's. A draw's number takes the
    place of its occurrence, so the same prompt drawn again is answered with other random numbers.

    `may_begin` is asked before each; while it says no, nothing begins. Draws in `known` are drawn and not begun: their answers are
    there already. Used from the engine's thread; what the other one reads is written once and whole."""

    def __init__(
        self, order: PromptOrder, reader: PromptReader, context: WorkerContext, last: int | None = None,
        may_begin: Callable[[], bool] = lambda: True, known: Collection[int] = (),
    ) -> None:  # fmt: skip
        self._order, self._reader, self._context, self._last = order, reader, context, last
        self._may_begin, self._known = may_begin, set(known)
        self.first = self.drawn = order.draws  # `drawn`: the number of the next draw
        self.marks: dict[int, tuple[int, int]] = {self.first: order.mark()}  # the order's place before each draw
        self.names: dict[int, Drawn] = {}
        self.unready: dict[int, str] = {}
        self.damaged: dict[int, str] = {}
        self.ended = False
        self._ahead: deque[tuple[int, Drawn, Future[Any]]] = deque()
        self._passed = self.first  # all of this rank's draws before are begun, known or unusable

    def mine(self, number: int) -> bool:
        return number % self._context.world_size == self._context.rank

    @property
    def begun_to(self) -> int:
        """Draws before this number are begun or will not be, as far as they are this rank's."""
        return self._passed

    def draw(self) -> tuple[int, Drawn] | None:
        """The next draw of the order, whosever it is; None at its end."""
        number = self.drawn
        found = self._order.draw(1, Counter()) if self._last is None or number < self._last else []
        if not found:
            return None
        drawn = Drawn(found[0].key, number)
        self.names[number] = drawn
        self.marks[number + 1] = self._order.mark()
        self.drawn = number + 1
        return number, drawn

    def __iter__(self) -> Iterator[Begun | None]:
        with ThreadPoolExecutor(2, thread_name_prefix="prompts-ahead") as pool:
            while True:
                while not self._may_begin():
                    yield None
                self._read_ahead(pool)
                if not self._ahead:
                    self._passed, self.ended = self.drawn, True
                    return
                number, drawn, future = self._ahead.popleft()
                usable, damaged = future.result()
                if damaged:
                    self.damaged[number] = damaged[0]
                self._passed = self._ahead[0][0] if self._ahead else self.drawn
                if usable:
                    yield Begun(number, drawn, usable[0][1])

    def _read_ahead(self, pool: ThreadPoolExecutor) -> None:
        while len(self._ahead) < AHEAD:
            found = self.draw()
            if found is None:
                return
            number, drawn = found
            _, unready = self._reader.without_unready([drawn])
            if unready:
                self.unready[number] = unready[0]
            elif self.mine(number) and number not in self._known:
                self._ahead.append((number, drawn, pool.submit(self._reader.read_usable, [drawn])))

    def forget(self, before: int) -> None:
        """What lies before this number is decided."""
        for held in (self.marks, self.names, self.unready, self.damaged):
            for number in [number for number in list(held) if number < before]:
                del held[number]
