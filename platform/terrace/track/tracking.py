"""What a controller says to its trackers, each in a thread of its own: a slow or dead server never holds up training.

Calls wait in order. One that fails while the server is away, or waits for a person, is made again every few minutes, for ever; one that
fails although the server answers is named and passed over after three tries, and those behind it go on. Rows are not kept here: a call
says which file to look at, so an outage of days costs no memory and loses nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from terrace.track.also import AlsoStore, open_also
from terrace.track.mlflow_store import Store
from terrace.track.points import Point
from terrace.track.series import RunSpec, Series, StoreWaitsError

LOGGER = logging.getLogger(__name__)
FIRST_WAIT_SECONDS, LARGEST_WAIT_SECONDS = 15.0, 180.0  # between two tries while the server is away
TRIES, TRY_SECONDS = 3, 1.0  # of a call that fails although the server answers
Work = tuple[str, Callable[[], object]]  # what it is, and how it is done


class Tracking:
    """Calls return at once; a run's id comes through the callback of its spec."""

    def __init__(self, store: Store | AlsoStore, warn: Callable[[str], None]):
        self._store, self._warn = store, warn
        self._works: deque[Work | threading.Event] = deque()
        self._waiting: set[tuple[str, Series]] = set()  # files that the queue will look at anyway
        self._changed = threading.Condition()
        self._closing = False
        self.away = False
        self.why = ""  # it is away: "is not reached: ...", in the words of the last error
        self.failed = 0  # calls that were passed over
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def open_run(self, spec: RunSpec) -> None:
        self._put((f"run {spec.name}", lambda: self._store.open_run(spec)))

    def log_rows(self, key: str, series: Series) -> None:
        """The file has new rows. Asked again before it was looked at, it is looked at once."""
        with self._changed:
            if (key, series) in self._waiting:
                return
            self._waiting.add((key, series))
        named = {(key, series)}

        def look() -> None:
            with self._changed:  # at the first try alone: while it is tried again, one more of them may wait, and no third
                self._waiting -= named
                named.clear()
            self._store.log_rows(key, series)

        self._put((f"steps of {series.path.parent.name}", look))

    def log_evaluation(self, key: str, points: Iterable[Point], step: int, at: float) -> None:
        points = list(points)
        self._put((f"evaluation at step {step}", lambda: self._store.log_evaluation(key, points, step, at)))

    def log_artifacts(self, key: str, paths: Iterable[Path]) -> None:
        for path in paths:
            self._put((f"artifact {path.name}", lambda path=path: self._store.log_artifact(key, path)))

    def log_model(self, key: str, name: str, place: str, step: int) -> None:
        self._put((f"model {name}", lambda: self._store.log_model(key, name, place, step)))

    def end_run(self, key: str, status: str, tags: dict[str, str] | None = None, ended: float | None = None) -> None:
        self._put(("end of a run", lambda: self._store.end_run(key, status, tags or {}, ended)))

    def flush(self, timeout_seconds: float = 30.0) -> bool:
        """Wait until everything so far is in the store; False if that took too long, or once the server is away."""
        reached = threading.Event()
        self._put(reached)
        end = time.monotonic() + timeout_seconds
        while not reached.wait(0.05):
            if self.away or time.monotonic() >= end:
                return False
        return True

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Send what is left; while the server is away, leave it to `terrace track`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        if self.away or self._thread.is_alive():
            self._warn(f"tracking at {self._store.uri} does not have all of this run; `terrace track RUN --uri URI` sends the rest")

    def _put(self, work: Work | threading.Event) -> None:
        with self._changed:
            self._works.append(work)
            self._changed.notify_all()

    # ------------------------------------------------------------ in the tracking thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._works or self._closing)
                if not self._works:
                    return
                work = self._works[0]
            if isinstance(work, threading.Event):
                work.set()
            elif not self._done(work):
                return
            with self._changed:
                self._works.popleft()

    def _done(self, work: Work) -> bool:
        """Do it until it is done or passed over. False: the server is away and nobody waits any more."""
        tries, wait = 0, FIRST_WAIT_SECONDS
        while True:
            try:
                work[1]()
            except Exception as error:  # whatever it is, training must not hear of it
                LOGGER.debug("tracking failed", exc_info=error)
                if not isinstance(error, StoreWaitsError) and self._store.answers():
                    self._back()
                    self._store.forget()
                    tries += 1
                    if tries >= TRIES:
                        self.failed += 1
                        self._warn(f"tracking at {self._store.uri}: {work[0]} was left out: {_line(error)}. The rest is logged.")
                        return True
                    self._closed(TRY_SECONDS)
                else:
                    self._gone(error)
                    if self._closed(wait):
                        return False
                    wait = min(LARGEST_WAIT_SECONDS, wait * 2)
            else:
                self._back()
                return True

    def _closed(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closing, seconds)

    def _gone(self, error: Exception) -> None:
        self.why = f"takes nothing: {error}" if isinstance(error, StoreWaitsError) else f"is not reached: {_line(error)}"
        if not self.away:
            self.away = True
            self._warn(
                f"tracking at {self._store.uri} {self.why}. The run goes on; metrics.jsonl keeps every step, and they"
                " are sent when it is back."
            )

    def _back(self) -> None:
        if self.away:
            self.away = False
            self._warn(f"tracking at {self._store.uri} is back")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Trackers:
    """Several of them told the same: MLflow first, whose ids of runs are the ones that a journal keeps."""

    def __init__(self, each: Sequence[Tracking]):
        self._each = list(each)

    def open_run(self, spec: RunSpec) -> None:
        for one in self._each:
            one.open_run(spec)

    def log_rows(self, key: str, series: Series) -> None:
        for one in self._each:
            one.log_rows(key, series)

    def log_evaluation(self, key: str, points: Iterable[Point], step: int, at: float) -> None:
        points = list(points)
        for one in self._each:
            one.log_evaluation(key, points, step, at)

    def log_artifacts(self, key: str, paths: Iterable[Path]) -> None:
        paths = list(paths)
        for one in self._each:
            one.log_artifacts(key, paths)

    def log_model(self, key: str, name: str, place: str, step: int) -> None:
        for one in self._each:
            one.log_model(key, name, place, step)

    def end_run(self, key: str, status: str, tags: dict[str, str] | None = None, ended: float | None = None) -> None:
        for one in self._each:
            one.end_run(key, status, tags, ended)

    def flush(self, timeout_seconds: float = 30.0) -> bool:
        """Whether everything so far is in all of them; see `Tracking.flush`."""
        flushed = [one.flush(timeout_seconds) for one in self._each]  # each of them, whatever another says
        return all(flushed)

    def close(self, timeout_seconds: float = 30.0) -> None:
        for one in self._each:
            one.close(timeout_seconds)

    @property
    def away(self) -> bool:
        """Whether one of them cannot be reached now."""
        return any(one.away for one in self._each)

    @property
    def why(self) -> str:
        """In the words of the last error: why one of them is away."""
        return next((one.why for one in self._each if one.away), "")

    @property
    def failed(self) -> int:
        """Calls that were passed over."""
        return sum(one.failed for one in self._each)


def open_tracking(
    run_dir: Path, uri: str | None, experiment: str, warn: Callable[[str], None], also: Sequence[str] = (), system_metrics: bool = False
) -> Trackers:
    """Tracking at `uri`, or in `RUN/mlflow.db`, and at each of `also`. A file of SQLite has its artifacts in `mlartifacts` beside it:
    MLflow's own choice would be `./mlruns` of whatever folder the command was called in. Raises InputError where a client is missing."""
    uri = uri or f"sqlite:///{Path(run_dir).absolute()}/mlflow.db"
    file = uri.removeprefix("sqlite:///")
    artifacts = Path(file).absolute().parent / "mlartifacts" if file != uri and file else None
    beside = [open_also(kind, run_dir, experiment, warn) for kind in dict.fromkeys(also)]
    stores = [Store(uri, experiment, artifacts, warn, system_metrics), *beside]
    return Trackers([Tracking(store, warn) for store in stores])
