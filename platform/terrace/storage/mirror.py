"""A run directory on s3://, as a local folder that follows it, so that everything else goes on working with files.

    run_dir = open_run("s3://bucket/runs/a")    # the local folder, brought to what the storage holds
    with following(run_dir):                    # both kept alike meanwhile (follower.py), and once more at the end
        ...

Small files (recipe, metrics, outcomes, heartbeats, requests) are synchronised both ways (synchronise.py). Large ones move when they
are complete and wanted: `store_folder` and `fetch_folder` here (prepared data, final weights), checkpoints in
`train/checkpoint_storage.py`, the journal and the lease in `curriculum/`. The storage is the truth: what a killed process had not
brought there did not happen. The price is that others see a stop request or a step two to twelve seconds late.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.recipe.credentials import credentials_problem
from terrace.storage import conditional, s3
from terrace.storage.files import atomic_path
from terrace.storage.follower import Follower, TellsLost, patiently
from terrace.storage.synchronise import LOCK, file_lock
from terrace.storage.synchronise import synchronise as synchronise_files

log = logging.getLogger(__name__)

MARK, USERS, FETCHED = ".storage.json", ".mirror.users", ".fetched"
STORED_AT = ".stored-at"  # in a folder here whose tensors may lie on the storage alone: where
ACCEPT = "TERRACE_STORAGE_WITHOUT_CONDITIONS"
WITHOUT_TENSORS = " without tensors"
DATA_LAST, FINAL_LAST = "prepared.json", "config.json"  # written last into their folders: with them, the folder is complete

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


def open_run(run: str | Path, admitted: bool = False) -> Path:
    """The local folder of a run. Of a stored one it is first brought to what the storage holds. `admitted`: for a worker, whose
    controller has been let in already, so that no refusal is taken for a mistake (`s3.admitted`).

    While no other process of this machine follows the run, what the storage does not know is dropped: it was written by a process
    that died before it could bring it there.
    """
    if not is_stored(run):
        return Path(run).absolute()
    uri = str(run).rstrip("/")
    if problem := credentials_problem(uri):
        raise InputError(f"the run's name {problem}")
    if not all(conditional.split(uri)):
        raise InputError(f"{run}: a run on S3 is named s3://BUCKET/PREFIX")
    if admitted:
        s3.admitted(uri)
    root = local_folder(uri)
    root.mkdir(parents=True, exist_ok=True)
    with file_lock(root / LOCK):
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


def require_conditions(run_dir: Path) -> None:
    """Refuse to control a stored run where the storage ignores conditional writes: two controllers or attempts could both write."""
    uri = uri_of(run_dir)
    if uri is None or not (ignored := conditional.ignored_conditions(uri)):
        return
    what = f"{uri}: this storage ignores {' and '.join(ignored)}, so nothing keeps a second controller or an older attempt from writing"
    if os.environ.get(ACCEPT) != "accept":
        raise InputError(f"{what}. Use a storage with conditional writes, or set {ACCEPT}=accept and start each run only once")
    log.warning("%s (%s=accept)", what, ACCEPT)


@contextlib.contextmanager
def following(run_dir: Path, lost: TellsLost | None = None) -> Iterator[Follower | None]:
    """Keep a stored run's folder and its storage alike until the block ends. For a run on this disk alone it does nothing.

    `lost` is called from another thread when the storage was away for ten minutes; the block decides what ends then.
    """
    root = root_of(run_dir)
    if root is None:
        yield None
        return
    end, follower = threading.Event(), Follower(root, str(uri_of(root)), lost)
    thread = threading.Thread(target=follower.follow, args=(end,), name="mirror", daemon=True)
    with open(root / USERS, "a") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        thread.start()
        try:
            yield follower
        finally:
            end.set()
            thread.join()
            last = partial(synchronise, root)
            last() if follower.lost is not None else patiently(last)


def flush(path: Path) -> None:
    """Bring what changed in the stored run of this path to the storage now."""
    if (root := root_of(path)) is not None:
        synchronise(root, push_only=True)


def refresh(path: Path) -> None:
    """Bring the stored run of this path and its storage alike now, before something is concluded from what is not here."""
    if (root := root_of(path)) is not None:
        synchronise(root)


def synchronise(root: Path, **how: Any) -> bool:
    """As `synchronise.synchronise`, of a stored run's folder."""
    return synchronise_files(root, str(uri_of(root)), **how)


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
    _note_fetched(folder, uri, last, whole=there.keys() <= set(names))


def fetch_folder(folder: Path, last: str, tensors: bool = True) -> bool:
    """Have a folder of a stored run here as the storage holds it; False where it is not complete there (or the run not stored).

    Without `tensors` the safetensors files directly in it stay there, and the folder says where (STORED_AT).
    """
    uri = uri_of(folder)
    if uri is None:
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_name(f".{folder.name}.lock")):
        found = conditional.read_versioned(f"{uri}/{last}")
        if found is None:
            return False
        noted, enough = folder / FETCHED, {found[1]} if tensors else {found[1], found[1] + WITHOUT_TENSORS}
        if noted.is_file() and noted.read_text() in enough and (folder / last).is_file():
            return True
        for entry in sorted(conditional.list_objects(uri), key=lambda entry: entry.name == last):
            if not tensors and _is_tensor_file(entry.name):
                (folder / entry.name).unlink(missing_ok=True)  # of an earlier version: nothing here is known to be this one's
                continue
            target = folder / entry.name
            with atomic_path(target) as temporary:
                conditional.fetch_copy(f"{uri}/{entry.name}", entry.size, temporary)
        _note(folder, uri, found[1], tensors)
    return True


def _note_fetched(folder: Path, uri: str, last: str, whole: bool) -> None:
    found = conditional.read_versioned(f"{uri}/{last}")
    _note(folder, uri, found[1] if found else "", whole)


def _note(folder: Path, uri: str, version: str, whole: bool) -> None:
    """What of which version of the storage's folder is here."""
    (folder / FETCHED).write_text(version + ("" if whole else WITHOUT_TENSORS))
    if whole:
        (folder / STORED_AT).unlink(missing_ok=True)
    else:
        (folder / STORED_AT).write_text(uri)


def _is_tensor_file(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors")


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
