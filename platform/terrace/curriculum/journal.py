"""The run's journal: append-only JSON Lines with one writer, who holds the run's lease.

Every event is written and fsynced before the action after it is carried out. A crash can leave a torn last line: a
reader skips it and says so, the next writer cuts it off. Of a run on S3 the whole journal is one object, replaced for
every event under the condition that it is still the version this writer wrote last: a writer that was overtaken cannot
add a line, whatever it believes about its lease. The price is one small read and, on S3, one write of the whole per
event, at a few events per stage.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.cluster.attempt_files import read_json, write_atomic
from terrace.curriculum.lease import (
    LEASE_SECONDS,
    Lease,
    LeaseHeld,
    LeaseLost,
    acquire_lease,
    holding,
    lease_holder,
    release_lease,
    renew_lease,
)
from terrace.errors import TerraceError
from terrace.storage import mirror
from terrace.storage.follower import patiently

__all__ = [
    "Journal", "JournalError", "Lease", "LeaseHeld", "LeaseLost", "acquire_lease", "lease_holder", "leave_request", "pending_requests",
    "read_journal", "release_lease", "renew_lease",
]  # fmt: skip
log = logging.getLogger(__name__)
JOURNAL_NAME = "journal.jsonl"


class JournalError(TerraceError):
    """The journal is damaged in a way that a crash of its writer cannot explain."""


@dataclass(frozen=True)
class JournalContent:
    """The events, the bytes they take, and the torn rest of a write that a crash cut short ('' for none)."""

    events: list[dict[str, Any]]
    valid_bytes: int
    torn: str = ""


def read_journal(run_dir: Path) -> JournalContent:
    """All complete events. Raises JournalError for a broken line that is not the last one."""
    path = Path(run_dir) / JOURNAL_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return JournalContent([], 0)
    events: list[dict[str, Any]] = []
    valid = 0
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # after the last newline: empty, or a torn write
            return JournalContent(events, valid, line.decode("utf-8", errors="replace"))
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines) - 1 and not lines[-1]:
                return JournalContent(events, valid, line.decode("utf-8", errors="replace"))
            raise JournalError(
                f"{path}, line {number}: not a JSON object ({error}). Restore the file or cut it before this line."
            ) from error
        events.append(event)
        valid += len(line) + 1
    return JournalContent(events, valid)


def last_seen(events: Iterable[dict[str, Any]]) -> float | None:
    """When somebody last worked on the run (seconds since the epoch); None where no event has a time."""
    return max((event["time"] for event in events if isinstance(event.get("time"), int | float)), default=None)


# ---------------------------------------------------------------- writer


class Journal:
    """The one writer. Use as a context manager: entering takes the lease, leaving gives it back.

    `events` are those read at the start plus those appended; `torn` is what a crash had left of an unfinished line.
    """

    def __init__(self, run_dir: Path, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.time):
        self.run_dir = Path(run_dir)
        self.events: list[dict[str, Any]] = []
        self.torn = ""
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._stop_renewing = threading.Event()
        self._lost: LeaseLost | None = None
        self._uri = mirror.uri_of(self.run_dir / JOURNAL_NAME)
        self._version: str | None = None  # of the object on S3

    def __enter__(self) -> Journal:
        self.lease = acquire_lease(self.run_dir, self._lease_seconds, self._clock)
        try:
            self._fetch()
            content = read_journal(self.run_dir)
            self.events, self.torn = content.events, content.torn
            path = self.run_dir / JOURNAL_NAME
            created = not path.exists()
            self._file = open(path, "ab")  # noqa: SIM115: closed in __exit__
            self._file.truncate(content.valid_bytes)
            os.fsync(self._file.fileno())
            if created:
                _sync_folder(self.run_dir)
        except BaseException:
            release_lease(self.lease)
            raise
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_renewing.set()
        self._renewer.join()
        self._file.close()
        release_lease(self.lease)

    def append(self, event: dict[str, Any]) -> dict[str, Any]:
        """Write one event durably and return it with its time, sequence and fencing token."""
        if self._lost:
            raise self._lost
        with holding(self.lease):
            complete = {
                "sequence": len(self.events) + 1,
                "time": round(self._clock(), 3),
                **event,
                "token": self.lease.token,
            }
            line = json.dumps(complete, allow_nan=False).encode() + b"\n"
            if self._uri is not None:
                self._store(self._uri, line)  # first there: the storage is the truth, the file here a copy
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.events.append(complete)
        return complete

    def _fetch(self) -> None:
        """Of a run on S3: the journal as it is there now, and its version."""
        if self._uri is None:
            return
        from terrace.storage.conditional import read_versioned

        content, self._version = read_versioned(self._uri) or (b"", None)
        write_atomic(self.run_dir / JOURNAL_NAME, content.decode())

    def _store(self, uri: str, line: bytes) -> None:
        """Replace the object by one with this line more. What the event speaks of goes before it."""
        from terrace.storage.conditional import Changed, write_if

        before = (self.run_dir / JOURNAL_NAME).read_bytes()
        try:
            patiently(lambda: mirror.flush(self.run_dir))
            self._version = patiently(lambda: write_if(uri, before + line, self._version))
        except Changed as error:
            self._lost = LeaseLost(f"{uri} has events of another controller; this one stops and writes nothing more")
            raise self._lost from error

    def _renew(self) -> None:
        while not self._stop_renewing.wait(self._lease_seconds / 4):
            try:
                renew_lease(self.lease, self._clock)
            except LeaseLost as error:
                self._lost = error
                return
            except TerraceError as error:  # the storage is away: the lease may expire, and then another's token will say so
                log.warning("the lease was not renewed: %s", error)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- requests from other processes


def leave_request(run_dir: Path, request: dict[str, Any], clock: Callable[[], float] = time.time) -> str:
    """Put a request (pause, suspend, cancel) where the living controller looks for it; returns its id."""
    command = f"{clock():.6f}-{os.getpid()}"
    write_atomic(Path(run_dir) / "requests" / f"{command}.json", json.dumps({**request, "command": command}))
    mirror.flush(Path(run_dir))
    return command


def pending_requests(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Requests not yet taken, oldest first."""
    paths = sorted((Path(run_dir) / "requests").glob("[0-9]*.json"))
    return [(path, request) for path in paths if (request := read_json(path))]
