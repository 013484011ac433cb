"""What goes on beside the demo's training: a clock, and an onlooker that asks the model of every finished stage.

Both look once a second, in threads that end with the run. What the onlooker could not do is done at the end; its failure says so
and stops nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from terrace.recipe.schema import Recipe

LOOK_SECONDS = 1.0


class Clock:
    """Seconds since it began, and CPU seconds of this process and of all that it started, looked at once a second."""

    def __init__(self) -> None:
        self._began, self._busy = time.time(), dict[tuple[int, float], float]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="clock", daemon=True)

    def __enter__(self) -> Clock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        return time.time() - self._began

    @property
    def cpu_seconds(self) -> float:
        self._look()
        return sum(self._busy.values())

    def _look_on(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                times = process.cpu_times()
                self._busy[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:
                continue  # it ended between two looks


class Onlooker:
    """Calls `finished(stages done)` in a thread, soon after each stage's end; the last one's is left to the caller."""

    def __init__(self, recipe: Recipe, run_dir: Path, finished: Callable[[int], None], say: Callable[[str], None]) -> None:
        self._folders = [run_dir / "stages" / f"{number:02d}-{stage.name}" for number, stage in enumerate(recipe.stages, start=1)]
        self._finished, self._say, self._seen = finished, say, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="onlooker", daemon=True)

    def __enter__(self) -> Onlooker:
        self._seen = self._done()  # a demo that is continued has shown these
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            done = self._done()
            if done == self._seen or done == len(self._folders):
                continue  # the whole is shown at the end
            self._seen = done
            try:
                self._finished(done)
            except Exception as error:
                self._say(f"the answers after stage {done} could not be shown ({error}); training goes on")

    def _done(self) -> int:
        return next((number for number, folder in enumerate(self._folders) if not (folder / "result.json").is_file()), len(self._folders))
