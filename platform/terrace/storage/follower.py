"""The thread that keeps a stored run's folder and its storage alike: one per machine, quiet while nothing changes, and never dead.

What changed here goes up every two seconds and costs no request while nothing did. What others wrote is asked for every two seconds
too, and every ten at most while the storage has nothing new (three listings each time). Of the processes of one machine that follow
the same run one does it; when it ends or hangs, another takes over.

Whatever goes wrong (a token that runs out, a bucket that a restarted gateway does not know yet, a fault of the network) is warned
about and tried again. After ten minutes without one success the run's owner is told, who ends it by name.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from terrace.storage.faults import StorageError
from terrace.storage.synchronise import Written, synchronise

log = logging.getLogger(__name__)

SYNC_SECONDS = 2.0
IDLE_SECONDS = 10.0  # between two listings while the storage has nothing new
LARGEST_WAIT_SECONDS = 30.0  # between two tries while the storage is away
LOST_SECONDS = 600.0
FROZEN_SECONDS = 90.0  # a process that was stopped or hangs keeps its lock; one that waits for the storage turns within a minute
FOLLOWER = ".mirror.follower"
TellsLost = Callable[[StorageError], None]
Result = TypeVar("Result")


@dataclass
class Follower:
    """`lost` is set once, when the storage was away for so long that the run must not go on unseen."""

    root: Path
    uri: str
    tell: TellsLost | None = None
    lost: StorageError | None = None
    written: Written = field(default_factory=Written)

    def follow(self, end: threading.Event) -> None:
        """Until `end` is set. No error leaves it."""
        wait, listing_wait = SYNC_SECONDS, SYNC_SECONDS
        success = time.monotonic()
        list_at = success
        with open(self.root / FOLLOWER, "a") as file:
            while not end.wait(wait):
                if not _is_mine(file):
                    success = time.monotonic()  # another process of this machine does it
                    continue
                try:
                    listing = time.monotonic() >= list_at
                    news = synchronise(self.root, self.uri, push_only=not listing, written=self.written)
                except Exception as error:  # of any kind: a dead thread would leave the run unseen
                    wait = min(LARGEST_WAIT_SECONDS, wait * 2)
                    self._warn(error, time.monotonic() - success, wait)
                    continue
                success, wait = time.monotonic(), SYNC_SECONDS
                if listing:
                    listing_wait = SYNC_SECONDS if news else min(IDLE_SECONDS, listing_wait * 1.5)
                    list_at = success + listing_wait - SYNC_SECONDS / 2  # half a turn early, not a whole one late

    def _warn(self, error: Exception, away: float, wait: float) -> None:
        log.warning("the run's storage is not reached (%s); next try in %.0f s", _words(error), wait)
        if away < LOST_SECONDS or self.lost is not None:
            return
        self.lost = StorageError(
            f"{self.uri}: nothing could be stored or read for {away / 60:.0f} minutes ({_words(error)}), so the run was stopped; mend the"
            " storage or the credentials, and the same command continues it"
        )
        log.error("%s", self.lost)
        if self.tell is not None:
            self.tell(self.lost)


def patiently(action: Callable[[], Result]) -> Result:
    """What a run cannot go on without: tried again for as long as the follower does. Raises StorageError after ten minutes."""
    end, wait = time.monotonic() + LOST_SECONDS, SYNC_SECONDS
    while True:
        try:
            return action()
        except StorageError as error:
            if time.monotonic() >= end:
                raise
            log.warning("the run waits for its storage (%s)", error)
        time.sleep(wait)
        wait = min(LARGEST_WAIT_SECONDS, wait * 2)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"


def _is_mine(file: IO[str]) -> bool:
    """Whether this process follows for the machine, now that it asked (again): nobody else does, or who does has not turned lately."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return time.time() - os.fstat(file.fileno()).st_mtime > FROZEN_SECONDS
    os.utime(file.fileno())
    return True
