"""The lease on a run directory: one controller at a time, and an old one that cannot write.

A small file with a fencing token that grows by one with every holder. It is renewed while the holder lives, and taken
over when its holder's process is gone from this machine, or has not renewed it (another machine). How long it was not
renewed is counted by this machine's clock from when this machine first saw it as it is, never from the times in it:
the clocks of two machines differ. A small file beside the lease keeps that from command to command. A holder that
lost its lease finds out before its next write: the token is no longer its own. On a disk the file is changed only under
an flock; on S3 each change is a conditional write, so of two controllers that come at once one is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from terrace.cluster.attempt_files import read_json, write_atomic
from terrace.errors import TerraceError
from terrace.storage import mirror
from terrace.storage.follower import patiently

LEASE_SECONDS = 60.0
LEASE_NAME = "controller.lease"
WATCH_SECONDS = 2.0  # between two looks at a lease that may run out
Content = dict[str, Any]


class LeaseHeld(TerraceError):
    """Another controller works on this run directory."""


class LeaseLost(TerraceError):
    """Another controller took this run directory over while this one did not renew its lease."""


@dataclass(frozen=True)
class Lease:
    """The right to write one run directory's journal. `token` fences: the highest one holds."""

    path: Path
    token: int
    seconds: float


def acquire_lease(run_dir: Path, seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.time) -> Lease:
    """Become the run directory's only controller. Raises LeaseHeld naming the other's host and process."""
    path = Path(run_dir) / LEASE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)

    def take(held: Content | None) -> Content:
        now = clock()
        if held and not held.get("released") and (left := _seconds_left(path, held, now)) > 0:
            raise LeaseHeld(_held_by(held, mirror.place_of(Path(run_dir)), left))
        return {
            "token": (held["token"] if held else 0) + 1,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": _process_started(os.getpid()),
            "acquired": now,
            "renewed": now,
            "expires": now + seconds,
            "released": False,
        }

    return Lease(path, _change(path, take)["token"], seconds)


def outlast_lease(
    run_dir: Path, tell: Callable[[str], None], clock: Callable[[], float] = time.time, pause: Callable[[float], None] = time.sleep
) -> None:
    """Watch the lease of a controller on another machine until it is renewed or has run out. Raises LeaseHeld where it is renewed.

    Whoever comes on a machine with an empty disk, as a pod does that replaces a dead one, has not seen the lease before. Were it refused
    at once, and its successor again on another machine, nobody would ever have seen it long enough.
    """
    path = Path(run_dir) / LEASE_NAME
    read = (lambda: read_json(path)) if mirror.uri_of(path) is None else (lambda: patiently(lambda: _read_stored(path)))
    first = held = read()
    while held and not held.get("released") and held["host"] != socket.gethostname():
        left = _seconds_left(path, held, clock())
        if left <= 0:
            return
        if _mark(held) != _mark(first):
            raise LeaseHeld(_held_by(held, mirror.place_of(Path(run_dir)), None))
        if held is first:
            who = f"process {held['pid']} on {held['host']} had this run and may be gone"
            tell(f"{who}: its lease is watched for {math.ceil(left)} s, and the run goes on here unless it is renewed")
        pause(min(left, WATCH_SECONDS))
        held = read()


def _held_by(held: Content, place: str, left: float | None) -> str:
    """Who works there, and what to do; whether a process of another machine still runs cannot be seen from here. `left`: None where it was
    seen to renew its lease."""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(held["acquired"]))
    who = f"process {held['pid']} on {held['host']} since {since} UTC"
    message = f"another controller works on {place}: {who}. `terrace suspend {place}` stops it."
    if left is None or held["host"] == socket.gethostname():
        return message
    return f"{message} If it is gone, run the command again in {math.ceil(left)} s, when its lease has run out"


def renew_lease(lease: Lease, clock: Callable[[], float] = time.time) -> None:
    """Raises LeaseLost when another controller holds the lease now."""

    def renew(held: Content | None) -> Content:
        now = clock()
        return {**_checked(lease, held), "renewed": now, "expires": now + lease.seconds}

    _change(lease.path, renew)


def release_lease(lease: Lease) -> None:
    """Give the lease back; of one that was lost already there is nothing to give."""
    with contextlib.suppress(LeaseLost):
        _change(lease.path, lambda held: {**_checked(lease, held), "released": True})


def lease_holder(run_dir: Path, clock: Callable[[], float] = time.time) -> Content | None:
    """The living controller of a run directory (host, pid, acquired), None when there is none."""
    held = read_json(Path(run_dir) / LEASE_NAME)
    return held if held and not held.get("released") and _seconds_left(Path(run_dir) / LEASE_NAME, held, clock()) > 0 else None


@contextlib.contextmanager
def holding(lease: Lease) -> Iterator[None]:
    """A block that only the lease's holder enters, while nobody else can take it (on one disk). Raises LeaseLost."""
    if mirror.root_of(lease.path) is not None:
        _checked(lease, patiently(lambda: _read_stored(lease.path)))
        yield
        return
    with _guarded(lease.path):
        _checked(lease, read_json(lease.path))
        yield


def _change(path: Path, change: Callable[[Content | None], Content]) -> Content:
    """Replace the lease by what `change` makes of it, with nobody in between; it may raise to leave it as it is."""
    uri = mirror.uri_of(path)
    if uri is None:
        with _guarded(path):
            content = change(read_json(path))
            write_atomic(path, json.dumps(content))
        return content
    from terrace.storage.conditional import swap

    return json.loads(swap(uri, lambda held: json.dumps(change(json.loads(held) if held else None)).encode()))


def _read_stored(path: Path) -> Content | None:
    from terrace.storage.conditional import read_versioned

    found = read_versioned(str(mirror.uri_of(path)))
    return json.loads(found[0]) if found else None


def _checked(lease: Lease, held: Content | None) -> Content:
    if held is None or held["token"] != lease.token:
        by = f"process {held['pid']} on {held['host']}" if held else "somebody who removed the lease file"
        raise LeaseLost(f"{mirror.place_of(lease.path.parent)} was taken over by {by}; this controller stops and writes nothing more")
    return held


def _seconds_left(path: Path, held: Content, now: float) -> float:
    """How long its holder counts as living: for ever while its process runs on this machine, 0 when it is gone from here."""
    if held["host"] == socket.gethostname():
        # The same machine (or container): the process table knows. A reused number has another start time.
        started = _process_started(held["pid"])
        return math.inf if started is not None and abs(started - held["process_started"]) < 2.0 else 0.0
    length = held["expires"] - held.get("renewed", held["acquired"])  # both by the holder's clock
    return max(0.0, length - (now - _unchanged_since(path, held, now)))


def _unchanged_since(path: Path, held: Content, now: float) -> float:
    """When this machine first saw the lease as it is now, by its own clock."""
    note = path.with_name(f".controller.seen-{socket.gethostname()}.json")
    lease = _mark(held)
    seen = read_json(note)
    if seen and seen["lease"] == lease and seen["since"] <= now:
        return float(seen["since"])
    with contextlib.suppress(OSError):  # a directory that may only be read
        write_atomic(note, json.dumps({"lease": lease, "since": now}))
    return now


def _mark(held: Content) -> list[Any]:
    """What differs between two holders, and each time that one renews its lease."""
    return [held["token"], held["host"], held["pid"], held.get("renewed")]


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
