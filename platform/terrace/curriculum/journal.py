"""The run's journal: append-only JSON Lines with one writer, and the lease that makes sure of the one.

Every event is written and fsynced before the action after it is carried out. A crash can leave a torn last line: a
reader skips it and says so, the next writer cuts it off. The lease is a small file with a fencing token that grows by
one with every holder; it is changed only under an flock, renewed while the holder lives, and taken over when its
holder's process is gone from this machine or has not renewed it in time (another machine). A holder that lost its
lease finds out before its next write: the token in the file is no longer its own. The price is one small read per
event, at a few events per stage.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from terrace.cluster.attempt import read_json, write_atomic
from terrace.errors import TerraceError

LEASE_SECONDS = 60.0
JOURNAL_NAME = "journal.jsonl"


class JournalError(TerraceError):
    """The journal is damaged in a way that a crash of its writer cannot explain."""


class LeaseHeld(TerraceError):
    """Another controller works on this run directory."""


class LeaseLost(TerraceError):
    """Another controller took this run directory over while this one did not renew its lease."""


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


# ---------------------------------------------------------------- lease


@dataclass(frozen=True)
class Lease:
    """The right to write one run directory's journal. `token` fences: the highest one holds."""

    path: Path
    token: int
    seconds: float


def acquire_lease(run_dir: Path, seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.time) -> Lease:
    """Become the run directory's only controller. Raises LeaseHeld naming the other's host and process."""
    path = Path(run_dir) / "controller.lease"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _guarded(path):
        held = _read_lease(path)
        now = clock()
        if held and not held.get("released") and _holder_lives(held, now):
            raise LeaseHeld(
                f"another controller works on {run_dir}: process {held['pid']} on {held['host']} since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(held['acquired']))} UTC. "
                f"`terrace suspend {run_dir}` stops it."
            )
        token = (held["token"] if held else 0) + 1
        content = {
            "token": token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "acquired": now,
            "renewed": now,
            "expires": now + seconds,
            "released": False,
        }
        write_atomic(path, json.dumps(content))
    return Lease(path, token, seconds)


def renew_lease(lease: Lease, clock: Callable[[], float] = time.time) -> None:
    """Raises LeaseLost when another controller holds the lease now."""
    with _guarded(lease.path):
        held = _checked(lease)
        now = clock()
        write_atomic(lease.path, json.dumps({**held, "renewed": now, "expires": now + lease.seconds}))


def release_lease(lease: Lease) -> None:
    """Give the lease back; of one that was lost already there is nothing to give."""
    with _guarded(lease.path):
        held = _read_lease(lease.path)
        if held and held["token"] == lease.token:
            write_atomic(lease.path, json.dumps({**held, "released": True}))


def lease_holder(run_dir: Path, clock: Callable[[], float] = time.time) -> dict[str, Any] | None:
    """The living controller of a run directory (host, pid, acquired), None when there is none."""
    held = _read_lease(Path(run_dir) / "controller.lease")
    return held if held and not held.get("released") and _holder_lives(held, clock()) else None


def _checked(lease: Lease) -> dict[str, Any]:
    held = _read_lease(lease.path)
    if held is None or held["token"] != lease.token:
        by = f"process {held['pid']} on {held['host']}" if held else "somebody who removed the lease file"
        raise LeaseLost(f"{lease.path.parent} was taken over by {by}; this controller stops and writes nothing more")
    return held


def _read_lease(path: Path) -> dict[str, Any] | None:
    return read_json(path)


def _holder_lives(held: dict[str, Any], now: float) -> bool:
    if held["host"] == socket.gethostname():
        # The same machine (or container): the process table knows. A reused number has another start time.
        started = _process_started(held["pid"])
        return started is not None and abs(started - held["process_started"]) < 2.0
    return now < held["expires"]


def _process_started(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[None]:
    with open(path.with_name(".controller.lock"), "a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(guard, fcntl.LOCK_UN)


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

    def __enter__(self) -> Journal:
        self.lease = acquire_lease(self.run_dir, self._lease_seconds, self._clock)
        try:
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
        with _guarded(self.lease.path):
            _checked(self.lease)
            complete = {
                "sequence": len(self.events) + 1,
                "time": round(self._clock(), 3),
                **event,
                "token": self.lease.token,
            }
            self._file.write(json.dumps(complete, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.events.append(complete)
        return complete

    def _renew(self) -> None:
        while not self._stop_renewing.wait(self._lease_seconds / 4):
            try:
                renew_lease(self.lease, self._clock)
            except LeaseLost as error:
                self._lost = error
                return


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
    return command


def pending_requests(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Requests not yet taken, oldest first."""
    paths = sorted((Path(run_dir) / "requests").glob("[0-9]*.json"))
    return [(path, request) for path in paths if (request := read_json(path))]
