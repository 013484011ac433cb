"""The watchdog: a hang becomes an error that says which ranks, at which step, doing what, with a stack of each.

A collective that one rank never joins, or data that never comes, leaves every rank waiting without a word. The loop
says what it is about to do (`mark`); a thread beside it looks at the time. When a rank has marked nothing for
`timeout_seconds`, it writes its stacks to the stage's `hang/attempt-NNN/`, waits a moment for the other ranks, which
wait in vain as well, to do the same, says what all of them were doing, and ends the process with status 1: the main
thread cannot be interrupted inside a collective, and the launcher starts the stage again from its last checkpoint.

Should the interpreter itself be held (native code that keeps the lock), the thread cannot run either; then a timer in C
(faulthandler) writes the stacks and ends the process a minute later. A mark costs a microsecond.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from terrace.recipe.schema import Stage
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

EXIT_STATUS = 1
OTHERS_SECONDS = 30.0  # how long a rank waits for the other ranks' files
NATIVE_GRACE_SECONDS = 60.0
SUMMARY = "summary.json"


def hang_folder(stage_dir: Path, attempt: int) -> Path:
    """Where the ranks of an attempt leave their stacks."""
    return stage_dir / "hang" / f"attempt-{attempt:03d}"


def hang_timeout_seconds(stage: Stage) -> float:
    """The recipe's, or half of the time after which the launcher would replace the attempt without asking why."""
    return stage.failure.hang_timeout_seconds or stage.failure.stall_timeout_seconds / 2


class Watchdog:
    """Context manager around a stage's training; at rest until the first mark. `end` ends the process."""

    def __init__(
        self, folder: Path, timeout_seconds: float, context: WorkerContext, stage: str, end: Callable[[int], None] = os._exit
    ) -> None:
        self._folder, self._timeout, self._context, self._stage, self._end = folder, timeout_seconds, context, stage, end
        self._others_seconds = min(OTHERS_SECONDS, timeout_seconds)
        self._seen: tuple[float, int, str] | None = None
        self._stopped = threading.Event()
        self._native: Any = None

    def mark(self, step: int, doing: str) -> None:
        """Progress: the rank now begins `doing` step `step` (from 1); the two are read together in the message."""
        self._seen = (time.monotonic(), step, doing)

    def rest(self) -> None:
        """Until the next mark, nothing counts as a hang: for work with time limits of its own."""
        self._seen = None

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._native = open(self._path("native", "txt"), "w", encoding="utf-8")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._native.close()
        self._path("native", "txt").unlink(missing_ok=True)
        for folder in (self._folder, self._folder.parent):  # only empty ones: stacks of an earlier attempt stay
            try:
                folder.rmdir()
            except OSError:
                break

    def _path(self, what: str, suffix: str) -> Path:
        return self._folder / f"{what}-{self._context.rank:05d}.{suffix}"

    def _watch(self) -> None:
        pause = min(self._timeout / 8, 5.0)
        while True:
            # Armed anew at every turn, so that it only ever fires when this thread cannot run.
            faulthandler.dump_traceback_later(self._timeout + NATIVE_GRACE_SECONDS, exit=True, file=self._native)
            if self._stopped.wait(pause):
                return
            seen = self._seen
            if seen is not None and time.monotonic() - seen[0] > self._timeout:
                try:
                    self._say(*seen)
                finally:
                    self._end(EXIT_STATUS)
                return

    def _say(self, since: float, step: int, doing: str) -> None:
        seen = {"rank": self._context.rank, "step": step, "doing": doing, "seconds": round(time.monotonic() - since, 1)}
        self._path("stacks", "txt").write_text(stacks(), encoding="utf-8")
        partial = self._path("partial", "json")
        partial.write_text(json.dumps(seen), encoding="utf-8")
        partial.replace(self._path("rank", "json"))
        message = describe(self._stage, self._others(), self._context.world_size, self._folder)
        summary = self._path("summary", "partial")
        summary.write_text(json.dumps({"message": message}), encoding="utf-8")
        summary.replace(self._folder / SUMMARY)
        log.error("%s", message)
        print(message, file=sys.stderr, flush=True)

    def _others(self) -> list[dict[str, Any]]:
        """What every rank said that still can; waits for them, because they notice within seconds of each other."""
        deadline = time.monotonic() + self._others_seconds
        while True:
            found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._folder.glob("rank-*.json"))]
            if len(found) >= self._context.world_size or time.monotonic() > deadline:
                return found
            time.sleep(min(0.2, self._others_seconds / 10))


def stacks() -> str:
    """The Python stack of every thread of this process, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
    blocks = [f"thread {names.get(ident, '?')}\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames]
    return "\n".join(blocks)


def describe(stage: str, ranks: list[dict[str, Any]], world_size: int, folder: Path) -> str:
    """One line: the ranks, the step each is at, and what it is doing, those furthest behind first."""
    groups: dict[tuple[int, str], list[int]] = {}
    for seen in ranks:
        groups.setdefault((seen["step"], seen["doing"]), []).append(seen["rank"])
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], len(item[1]), item[1]))
    parts = [f"{_ranks(members)} {doing} step {step}" for (step, doing), members in ordered]
    silent = sorted(set(range(world_size)) - {seen["rank"] for seen in ranks})
    if silent:
        parts.append(f"{_ranks(silent)} said nothing (ended, or held in native code)")
    longest = max((seen["seconds"] for seen in ranks), default=0.0)
    return f"stage {stage}: no progress for {longest:.0f} s: {'; '.join(parts)}. Stacks of every rank: {folder}"


def _ranks(members: list[int]) -> str:
    shown = ", ".join(map(str, members[:8])) + (f" and {len(members) - 8} more" if len(members) > 8 else "")
    return f"rank {shown}" if len(members) == 1 else f"ranks {shown}"
