"""Both directions of a stored run's small files: what the storage has newer comes here, what is newer here goes there.

Each file has one writer at a time, and each is written under the condition that the storage still holds the version seen last, so what
a superseded writer still has to say is refused. What both sides agreed on last is kept beside the files, under one lock per machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from terrace.storage import conditional
from terrace.storage.conditional import Changed, Listed
from terrace.storage.files import atomic_path

log = logging.getLogger(__name__)

LARGEST_BYTES = 512 * 2**20  # a file beyond this (a profiler's trace) stays on its machine
UPLOAD_BYTES_PER_SECOND = 2**20  # a file that grows is written whole each time: it waits a second per MiB between two writes
BEAT_SECONDS = 4.0  # between two writes of a machine's heartbeat
STATE, LOCK = ".mirror.json", ".mirror.lock"
_NOT_AT_TOP = ("data", "ray", "mlruns", "mlartifacts", "tensorboard", "wandb", "swanlab")
_OWN_WRITER = ("journal.jsonl", "controller.lease")  # written through conditional writes of their own; only read here


@dataclass(frozen=True)
class Known:
    """A file as it was when local folder and storage last agreed on it."""

    mtime_ns: int
    size: int
    version: str
    modified: float


@dataclass
class Written:
    """What the follower of a machine remembers of its writes."""

    due: dict[str, float] = field(default_factory=dict)  # when each file, and each attempt's heartbeat, may be written next
    beats: dict[str, bytes] = field(default_factory=dict)  # what each worker's sign of life says


def synchronise(
    root: Path,
    uri: str,
    pull_only: bool = False,
    push_only: bool = False,
    drop_unknown: bool = False,
    written: Written | None = None,
) -> bool:
    """Take what the storage has newer, then bring what this folder has newer. `written`: of earlier calls, which some files wait for.

    True where the storage had something newer.
    """
    with file_lock(root / LOCK):
        known = _load(root)
        before = dict(known)
        if not push_only:
            _pull(root, uri, known, drop_unknown)
        news = known != before
        if not pull_only:
            _push(root, uri, known, written)
        if known != before:
            with atomic_path(root / STATE) as temporary:
                temporary.write_text(json.dumps({name: asdict(entry) for name, entry in known.items()}))
    return news


def is_small(name: str) -> bool:
    """Whether a file of the run (by its path in it) is synchronised; the others move in whole folders, or stay here."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts) or parts[0] in _NOT_AT_TOP or parts[-1].startswith("mlflow.db"):
        return False
    if parts[0] == "stages" and len(parts) > 3:
        return parts[2] != "final" and (parts[2] != "checkpoints" or parts[3:] == ["attempt.json"])
    return True


def _has_own_writer(name: str) -> bool:
    return name in _OWN_WRITER or name.endswith("/checkpoints/attempt.json")


def _may_vanish(name: str) -> bool:
    """Files whose deletion here means something. All others come back: a cleaner of temporary files may have taken them."""
    parts = name.split("/")
    return parts[0] == "requests" or _is_heartbeat(name) or "iterations" in parts[2:3]


def _is_heartbeat(name: str) -> bool:
    return name.rpartition("/")[2].startswith("alive-")


def _pull(root: Path, uri: str, known: dict[str, Known], drop_unknown: bool) -> None:
    remote = {entry.name: entry for entry in _list_small(uri)}
    for name, entry in remote.items():
        _pull_one(root, uri, name, entry, known, drop_unknown)
    for name in [name for name in known if name not in remote]:
        if _stamp(root / name) == (known[name].mtime_ns, known[name].size):
            (root / name).unlink(missing_ok=True)
        del known[name]
    if drop_unknown:
        for name in _local_names(root):
            if name not in remote:
                (root / name).unlink(missing_ok=True)


def _pull_one(root: Path, uri: str, name: str, entry: Listed, known: dict[str, Known], drop_unknown: bool) -> None:
    local, seen, path = _stamp(root / name), known.get(name), root / name
    unchanged_here = seen is not None and local == (seen.mtime_ns, seen.size)
    if seen is not None and seen.version == entry.version and (unchanged_here or (local is not None and not drop_unknown)):
        if unchanged_here and entry.modified > seen.modified + 1:  # a heartbeat of another machine: same content, newer
            os.utime(path, (entry.modified, entry.modified))
            known[name] = Known(path.stat().st_mtime_ns, seen.size, seen.version, entry.modified)
        return
    if local is None and seen is not None and seen.version == entry.version and _may_vanish(name):
        return  # deleted here; the storage hears of it next
    found = conditional.read_versioned(f"{uri}/{name}")
    if found is None:
        return
    content, version = found
    if local is not None and not unchanged_here and not drop_unknown and path.read_bytes().startswith(content):
        # Ours and longer: somebody died between writing to the storage and noting it. Its mark makes it go up again.
        known[name] = Known(0, len(content), version, entry.modified)
        return
    if unchanged_here and name.endswith(".jsonl") and content.startswith(path.read_bytes()):
        with open(path, "ab") as file:  # it grew: a reader that follows the file must not begin again
            file.write(content[seen.size :])
        os.utime(path, (entry.modified, entry.modified))
    else:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
            os.utime(temporary, (entry.modified, entry.modified))
    known[name] = Known(path.stat().st_mtime_ns, len(content), version, entry.modified)


def _push(root: Path, uri: str, known: dict[str, Known], written: Written | None) -> None:
    names = set(_local_names(root))
    for name in sorted(names):
        stamp, seen = _stamp(root / name), known.get(name)
        if stamp is None or _has_own_writer(name) or (seen is not None and stamp == (seen.mtime_ns, seen.size)):
            continue
        try:
            if written is not None and not _is_due(root, name, stamp[1], seen, written):
                continue
            content = (root / name).read_bytes()
            version = conditional.write_if(f"{uri}/{name}", content, seen.version if seen else None)
        except FileNotFoundError:
            continue
        except Changed:
            log.warning("%s/%s was written by a newer attempt; this process's version of it is dropped", uri, name)
            continue  # the next pull takes what is there
        known[name] = Known(stamp[0], stamp[1], version, time.time())
        if written is not None and _is_heartbeat(name):
            written.beats[name] = content
            _speak_for_others(root, _folder(name), known, written)
    for name in [name for name in known if name not in names and not (root / name).exists()]:
        if _may_vanish(name):
            conditional.remove([f"{uri}/{name}"])
        del known[name]


def _is_due(root: Path, name: str, size: int, seen: Known | None, written: Written) -> bool:
    """Whether a file that changed goes up now. Of the workers of a machine that only say again that they live, one speaks for all."""
    now, whose, pause = time.monotonic(), name, size / UPLOAD_BYTES_PER_SECOND
    if seen is not None and _only_beats(root, name, written):
        whose, pause = _folder(name), BEAT_SECONDS
    if now < written.due.get(whose, 0.0):
        return False
    written.due[whose] = now + pause
    return True


def _only_beats(root: Path, name: str, written: Written) -> bool:
    return name in written.beats and (root / name).read_bytes() == written.beats[name]


def _speak_for_others(root: Path, folder: str, known: dict[str, Known], written: Written) -> None:
    """What the others touched until now needs no words of its own: one that has died since would seem to live for another turn."""
    for name in written.beats:
        with contextlib.suppress(FileNotFoundError):
            if name in known and _folder(name) == folder and _only_beats(root, name, written):
                known[name] = replace(known[name], mtime_ns=(root / name).stat().st_mtime_ns)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _list_small(uri: str) -> list[Listed]:
    """The small files: those at the top, and below the two folders that hold some."""
    found = conditional.list_objects(uri, deep=False)
    for folder in ("stages", "requests"):
        below = conditional.list_objects(f"{uri}/{folder}")
        found += [Listed(f"{folder}/{entry.name}", entry.size, entry.version, entry.modified) for entry in below]
    return [entry for entry in found if is_small(entry.name)]


def _local_names(root: Path) -> list[str]:
    names = []
    for folder, below, files in os.walk(root):
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        below[:] = [name for name in below if not name.startswith(".") and (prefix or name not in _NOT_AT_TOP) and name != "final"]
        names += [prefix + name for name in files if is_small(prefix + name)]
    return [name for name in names if (stamp := _stamp(root / name)) is not None and stamp[1] <= LARGEST_BYTES]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size


def _load(root: Path) -> dict[str, Known]:
    try:
        stored = json.loads((root / STATE).read_text())
    except FileNotFoundError:
        return {}
    return {name: Known(**entry) for name, entry in stored.items()}


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Wait for, then hold, the lock on a file of this machine."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
