"""Generation in the background: prompts go into an engine as it has room, and come back as scored groups, the first one first judged.

The engine runs in a thread of its own, so that this rank's main thread may exchange groups with others, or train, meanwhile.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from terrace.generation.interface import Prompt, Response, RolloutEngine, Sampling
from terrace.rewards.types import Score
from terrace.rl.prompts import Drawn

TICK = 1.0  # seconds: how often a waiting thread looks whether the other one has ended


@dataclass(frozen=True)
class Begun:
    """A prompt that is given to the engine; `number` is that of its draw in the stage."""

    number: int
    drawn: Drawn
    prompt: Prompt


@dataclass
class Answered:
    """A prompt with its responses and their scores. Times are time.time()."""

    begun: Begun
    responses: list[Response]
    scores: list[Score]
    decoded_at: float
    judged_at: float

    @property
    def rewards(self) -> np.ndarray:
        """float64 [G], NaN where there is none."""
        return np.asarray([np.nan if score.value is None else score.value for score in self.scores], np.float64)


Judge = Callable[[Prompt, list[Response]], Future[list[Score]]]


class Stream:
    """`source` yields the prompts in order, None where none may begin now. `close` gives up what is not answered."""

    def __init__(
        self, engine: RolloutEngine, sampling: Sampling, source: Iterator[Begun | None], judge: Judge,
        told: Callable[[Answered], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """`told` hears of every answer at once, in whatever thread it came."""
        self._engine, self._sampling, self._source, self._judge, self._told = engine, sampling, source, judge, told
        self._begun: list[Begun] = []
        self._answered: list[Answered] = []
        self._open = 0  # groups that are decoded and not judged
        self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
        self._thread.start()

    @property
    def begun(self) -> int:
        """Groups that were given to the engine so far."""
        return len(self._begun)

    def taken(self, tick: Callable[[], None], seconds: float = TICK) -> list[Answered]:
        """What was answered since the last call; waits for it at most `seconds`. `tick` is called where something came.
        Raises what the engine, the source or a reward raised."""
        with self._changed:
            if not self._answered and not self._over:
                self._changed.wait(seconds)
            if self._error is not None:
                raise self._error
            taken, self._answered = self._answered, []
        if taken:
            tick()
        return taken

    @property
    def _over(self) -> bool:
        return self._error is not None or (self._ended and not self._open)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        with self._changed:
            return self._over and not self._answered

    def close(self) -> None:
        """End generation after the step that runs."""
        self._stop.set()
        self._thread.join()

    # ------------------------------------------------------------ in the thread

    def _work(self) -> None:
        try:
            self._engine.generate(self._prompts(), self._sampling, self._ready, stop=self._stop.is_set)
        except BaseException as error:
            self._failed(error)
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _prompts(self) -> Iterator[Prompt | None]:
        for begun in self._source:
            if self._stop.is_set():
                return
            if begun is not None:
                self._begun.append(begun)
            yield begun.prompt if begun is not None else None

    def _ready(self, place: int, group: list[Response]) -> None:
        with self._changed:
            self._open += 1
        future = self._judge(self._begun[place].prompt, group)
        future.add_done_callback(functools.partial(self._judged, self._begun[place], group, time.time()))

    def _judged(self, begun: Begun, group: list[Response], decoded_at: float, future: Future[Any]) -> None:
        error = future.exception()
        with self._changed:
            self._open -= 1
            if error is None:
                answered = Answered(begun, group, future.result(), decoded_at, time.time())
                self._told(answered)
                self._answered.append(answered)
            self._changed.notify_all()
        if error is not None:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._stop.set()
