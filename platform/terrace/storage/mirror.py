"""A run directory on s3://, as a local folder that follows it, so that everything else goes on working with files.

    run_dir = open_run("s3://bucket/runs/a")    # the local folder, brought to what the storage holds
    with following(run_dir):                    # both kept alike every two seconds, and once more at the end
        ...

Small files (recipe, metrics, outcomes, heartbeats, requests) are synchronised both ways; each has one writer at a time, and each is
written under the condition that the storage still holds the version seen last, so what a superseded writer still has to say is
refused. Large ones move when they are complete and wanted: `store_folder` and `fetch_folder` here (prepared data, final weights),
checkpoints in `train/checkpoint_storage.py`, the journal and the lease in `curriculum/`. The storage is the truth: what a killed
process had not brought there did not happen. The price is a listing every two seconds per machine, and that others see a stop
request or a step two to four seconds late.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from terrace.errors import InputError
from terrace.storage import conditional
from terrace.storage.conditional import Changed, Listed
from terrace.storage.files import StorageError, atomic_path

log = logging.getLogger(__name__)

SYNC_SECONDS = 2.0
LARGEST_BYTES = 512 * 2**20  # a file beyond this (a profiler's trace) stays on its machine
UPLOAD_BYTES_PER_SECOND = 2**20  # a file that grows is written whole each time: it waits a second per MiB between two writes
MARK, STATE, LOCK, USERS, FETCHED = ".storage.json", ".mirror.json", ".mirror.lock", ".mirror.users", ".fetched"
DATA_LAST, FINAL_LAST = "prepared.json", "config.json"  # written last into their folders: with them, the folder is complete
_NOT_AT_TOP = ("data", "ray", "mlruns", "mlartifacts")
_OWN_WRITER = ("journal.jsonl", "controller.lease")  # written through conditional writes of their own; only read here


@dataclass(frozen=True)
class Known:
    """A file as it was when local folder and storage last agreed on it."""

    mtime_ns: int
    size: int
    version: str
    modified: float


# ---------------------------------------------------------------- names


def is_stored(run: str | Path) -> bool:
    """Whether a run is named by its place on the storage."""
    return str(run).startswith("s3://")


def local_folder(uri: str) -> Path:
    """Where this machine keeps a run of the storage."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    return Path(cache) / "terrace" / "runs" / f"{name}-{hashlib.sha256(uri.rstrip('/').encode()).hexdigest()[:10]}"


def root_of(path: Path) -> Path | None:
    """The local folder of the stored run that a path lies in; None for a run that lives on this disk alone."""
    path = Path(path).absolute()
    return next((folder for folder in (path, *path.parents) if (folder / MARK).is_file()), None)


def uri_of(path: Path) -> str | None:
    """Where a file or folder of a stored run lies on the storage; None for a run that lives on this disk alone."""
    root = root_of(path)
    if root is None:
        return None
    uri, inside = json.loads((root / MARK).read_text())["uri"], Path(path).absolute().relative_to(root).as_posix()
    return uri if inside == "." else f"{uri}/{inside}"


def place_of(run_dir: Path) -> str:
    """The run's name for other machines: its URI, or its path on a disk that they share."""
    return uri_of(run_dir) or str(Path(run_dir).absolute())


# ---------------------------------------------------------------- opening and following


def open_run(run: str | Path) -> Path:
    """The local folder of a run. Of a stored one it is first brought to what the storage holds.

    While no other process of this machine follows the run, what the storage does not know is dropped: it was written by a process
    that died before it could bring it there.
    """
    if not is_stored(run):
        return Path(run).absolute()
    uri = str(run).rstrip("/")
    if not all(conditional.split(uri)):
        raise InputError(f"{run}: a run on S3 is named s3://BUCKET/PREFIX")
    root = local_folder(uri)
    root.mkdir(parents=True, exist_ok=True)
    with _flock(root / LOCK):
        if not (root / MARK).is_file():
            with atomic_path(root / MARK) as temporary:
                temporary.write_text(json.dumps({"uri": uri}))
    with open(root / USERS, "a") as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            alone = False
        synchronise(root, pull_only=True, drop_unknown=alone)
    return root


@contextlib.contextmanager
def following(run_dir: Path) -> Iterator[None]:
    """Keep a stored run's folder and its storage alike until the block ends. For a run on this disk alone it does nothing."""
    root = root_of(run_dir)
    if root is None:
        yield
        return
    end, written = threading.Event(), {}

    def follow() -> None:
        while not end.wait(SYNC_SECONDS):
            try:
                synchronise(root, throttle=written)
            except StorageError as error:
                log.warning("the run's storage is not reached: %s", error)

    thread = threading.Thread(target=follow, name="mirror", daemon=True)
    with open(root / USERS, "a") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            synchronise(root)


def flush(path: Path) -> None:
    """Bring what changed in the stored run of this path to the storage now."""
    if (root := root_of(path)) is not None:
        synchronise(root, push_only=True)


def refresh(path: Path) -> None:
    """Bring the stored run of this path and its storage alike now, before something is concluded from what is not here."""
    if (root := root_of(path)) is not None:
        synchronise(root)


def synchronise(
    root: Path, pull_only: bool = False, push_only: bool = False, drop_unknown: bool = False, throttle: dict[str, float] | None = None
) -> None:
    """Take what the storage has newer, then bring what this folder has newer. `throttle`: when each file was last written."""
    uri = str(uri_of(root))
    with _flock(root / LOCK):
        known = _load(root)
        before = dict(known)
        if not push_only:
            _pull(root, uri, known, drop_unknown)
        if not pull_only:
            _push(root, uri, known, throttle)
        if known != before:
            with atomic_path(root / STATE) as temporary:
                temporary.write_text(json.dumps({name: asdict(entry) for name, entry in known.items()}))


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
    return parts[0] == "requests" or parts[-1].startswith("alive-") or "iterations" in parts[2:3]


# ---------------------------------------------------------------- both directions


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


def _push(root: Path, uri: str, known: dict[str, Known], throttle: dict[str, float] | None) -> None:
    names = set(_local_names(root))
    for name in sorted(names):
        stamp, seen = _stamp(root / name), known.get(name)
        if stamp is None or _has_own_writer(name) or (seen is not None and stamp == (seen.mtime_ns, seen.size)):
            continue
        now = time.monotonic()
        if throttle is not None:
            if now < throttle.get(name, 0.0):
                continue
            throttle[name] = now + stamp[1] / UPLOAD_BYTES_PER_SECOND
        try:
            content = (root / name).read_bytes()
            version = conditional.write_if(f"{uri}/{name}", content, seen.version if seen else None)
        except FileNotFoundError:
            continue
        except Changed:
            log.warning("%s/%s was written by a newer attempt; this process's version of it is dropped", uri, name)
            continue  # the next pull takes what is there
        known[name] = Known(stamp[0], stamp[1], version, time.time())
    for name in [name for name in known if name not in names and not (root / name).exists()]:
        if _may_vanish(name):
            conditional.remove([f"{uri}/{name}"])
        del known[name]


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
def _flock(path: Path) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- whole folders


def store_folder(folder: Path, last: str) -> None:
    """Bring a finished folder of a stored run to the storage, the file `last` last. Files it has already are passed over."""
    uri = uri_of(folder)
    if uri is None:
        return
    there = {entry.name: entry.size for entry in conditional.list_objects(uri)}
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    for name in sorted(names, key=lambda name: name == last):
        # Small ones are always written: another content can have the same size.
        if there.get(name) != (folder / name).stat().st_size or (folder / name).stat().st_size < 2**20 or last == FINAL_LAST:
            conditional.store_copy(folder / name, f"{uri}/{name}")
    _note_fetched(folder, uri, last)


def fetch_folder(folder: Path, last: str) -> bool:
    """Have a folder of a stored run here as the storage holds it; False where it is not complete there (or the run not stored)."""
    uri = uri_of(folder)
    if uri is None:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _flock(folder.with_name(f".{folder.name}.lock")):
        found = conditional.read_versioned(f"{uri}/{last}")
        if found is None:
            return False
        noted = folder / FETCHED
        if noted.is_file() and noted.read_text() == found[1] and (folder / last).is_file():
            return True
        for entry in sorted(conditional.list_objects(uri), key=lambda entry: entry.name == last):
            target = folder / entry.name
            with atomic_path(target) as temporary:
                conditional.fetch_copy(f"{uri}/{entry.name}", entry.size, temporary)
        noted.write_text(found[1])
    return True


def _note_fetched(folder: Path, uri: str, last: str) -> None:
    found = conditional.read_versioned(f"{uri}/{last}")
    (folder / FETCHED).write_text(found[1] if found else "")


def move_folder(folder: Path, aside: Path) -> None:
    """Move a folder of a stored run on the storage. May be called again after it was cut short; once it is done it does nothing."""
    uri, target = uri_of(folder), uri_of(aside)
    if uri is None or target is None or conditional.read_versioned(f"{target}/.moved") is not None:
        return
    names = [entry.name for entry in conditional.list_objects(uri)]
    for name in names:
        conditional.copy_object(f"{uri}/{name}", f"{target}/{name}")
    conditional.remove([f"{uri}/{name}" for name in names])
    conditional.write_if(f"{target}/.moved", b"", None)
