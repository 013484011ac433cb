"""The checkpoints of a stage whose run lives on S3: uploaded as they are written, complete when the fence says so.

    checkpoints/
      attempt.json                                the fence: the youngest attempt, and which checkpoints are complete
      step-000120/attempt-003/manifest.json, state.json, weights-00000.safetensors …

There is no rename on S3, so a checkpoint becomes complete by one conditional write of the fence object that adds its
step. A younger attempt declares itself by a conditional write of the same object, and from then on the older one's
fails: whatever it still uploads, below a prefix of its own, counts for nothing. The disk holds a file only while it is written; of a
checkpoint that is read it has the small files, and each rank reads from the others the ranges that it needs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.errors import TerraceError
from terrace.storage import conditional
from terrace.storage.files import join
from terrace.storage.follower import patiently
from terrace.storage.run_storage import RunStorage

log = logging.getLogger(__name__)
FENCE = "attempt.json"
MANIFEST, INDEX, STATE = "manifest.json", "index.json", "state.json"


class Superseded(TerraceError):
    """A younger attempt of the same stage has taken over; this one must not write any more."""


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint: which attempt wrote it, the sha256 of its manifest, and what was measured at its step."""

    attempt: int
    manifest_sha256: str
    metrics: dict[str, float]


class StoredCheckpoints:
    """The folder `checkpoints` of one stage on S3."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    # ------------------------------------------------------------ fence

    def raise_fence(self, attempt: int) -> None:
        """Declare this attempt the youngest. Raises Superseded if a younger one has declared itself."""
        self._change(attempt, {})

    def _check(self, attempt: int) -> None:
        found = conditional.read_versioned(join(self.uri, FENCE))
        youngest = int(json.loads(found[0])["attempt"]) if found else 0
        if youngest > attempt:
            raise self._superseded(attempt, youngest)

    def _superseded(self, attempt: int, youngest: int) -> Superseded:
        return Superseded(f"attempt {attempt} may not write to {self.uri}: attempt {youngest} has taken over")

    def complete(self) -> dict[int, Entry]:
        """Complete checkpoints by step."""
        found = conditional.read_versioned(join(self.uri, FENCE))
        listed = json.loads(found[0])["complete"] if found else {}
        return {int(step): Entry(**entry) for step, entry in listed.items()}

    def commit(self, step: int, attempt: int, manifest: bytes, metrics: dict[str, float]) -> None:
        """Make the uploaded checkpoint of this step the complete one. Raises Superseded."""
        entry = {"attempt": attempt, "manifest_sha256": hashlib.sha256(manifest).hexdigest(), "metrics": metrics}
        self._change(attempt, {str(step): entry})

    def drop(self, steps: list[int], attempt: int) -> None:
        """Remove checkpoints: first they are complete no more, then their files go."""
        if not steps:
            return
        self._change(attempt, {str(step): None for step in steps})
        for step in steps:
            folder = join(self.uri, folder_name(step))
            patiently(lambda folder=folder: conditional.remove([join(folder, entry.name) for entry in conditional.list_objects(folder)]))

    def remove_remains(self, attempt: int) -> None:
        """Delete what older attempts uploaded of checkpoints that they did not complete."""
        kept = {(folder_name(step), attempt_name(entry.attempt)) for step, entry in self.complete().items()}
        remains = []
        for entry in conditional.list_objects(self.uri):
            parts = entry.name.split("/")
            older = len(parts) == 3 and parts[1].startswith("attempt-") and int(parts[1][8:]) < attempt
            if older and (parts[0], parts[1]) not in kept:
                remains.append(join(self.uri, entry.name))
        for folder in sorted({uri.rpartition("/")[0] for uri in remains}):
            log.warning("%s is passed over and removed: attempt %d began after it and the fence does not list it", folder, attempt)
        conditional.remove(remains)

    def _change(self, attempt: int, entries: dict[str, Any]) -> None:
        def change(content: bytes | None) -> bytes:
            fence = json.loads(content) if content else {"attempt": attempt, "complete": {}}
            if fence["attempt"] > attempt:
                raise self._superseded(attempt, fence["attempt"])
            complete = {step: entry for step, entry in (fence["complete"] | entries).items() if entry is not None}
            return (json.dumps({"attempt": attempt, "complete": complete}, indent=1) + "\n").encode()

        patiently(lambda: conditional.swap(join(self.uri, FENCE), change))

    # ------------------------------------------------------------ writing

    def prefix(self, step: int, attempt: int) -> str:
        return join(self.uri, folder_name(step), attempt_name(attempt))

    def upload(self, file: Path, step: int, attempt: int) -> None:
        """Raises Superseded before it writes. What a superseded attempt was uploading at that moment, nothing lists. A storage that is away
        is waited for: training goes on meanwhile, and an attempt that failed here would cost all its ranks the steps since the last one."""

        def store() -> None:
            self._check(attempt)
            conditional.store_copy(file, join(self.prefix(step, attempt), file.name))

        patiently(store)

    def await_report(self, name: str, step: int, attempt: int, seconds: float) -> bytes | None:
        """A small object that another rank leaves when its files are there; None when it did not come in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (found := patiently(lambda: conditional.read_versioned(join(self.prefix(step, attempt), name)))) is not None:
                return found[0]
            time.sleep(0.2)
        return None

    # ------------------------------------------------------------ reading

    def steps_and_faults(self) -> list[tuple[int, str | None]]:
        """Every step of which something is there, highest first, with why it cannot be complete (None: it can)."""
        complete = self.complete()
        present: dict[int, dict[str, int]] = {}
        for listed in conditional.list_objects(self.uri):
            folder, _, inside = listed.name.partition("/")
            if inside and folder.startswith("step-") and folder[5:].isdigit():
                present.setdefault(int(folder[5:]), {})[inside] = listed.size
        found: list[tuple[int, str | None]] = []
        for step in sorted(present.keys() | complete.keys(), reverse=True):
            entry = complete.get(step)
            if entry is None:
                found.append((step, "the fence does not list it (the write was interrupted, or its attempt was superseded)"))
            elif f"{attempt_name(entry.attempt)}/{MANIFEST}" not in present.get(step, {}):
                found.append((step, f"{attempt_name(entry.attempt)}/{MANIFEST} is missing"))
            else:
                found.append((step, None))
        return found

    def fetch(self, step: int, folder: Path) -> str | None:
        """Copy the small files of a complete checkpoint (what it is, not its tensors) into `folder` unless they are there; why it cannot
        be used, or None. Checksums are the caller's."""
        entry = self.complete().get(step)
        if entry is None:
            return "the fence does not list it"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "a") as lock:  # ranks of one machine share the copy
            fcntl.flock(lock, fcntl.LOCK_EX)
            here = folder / MANIFEST
            if here.is_file() and hashlib.sha256(here.read_bytes()).hexdigest() == entry.manifest_sha256:
                return None
            shutil.rmtree(folder, ignore_errors=True)
            work = folder.with_name(f".fetching-{folder.name}")
            shutil.rmtree(work, ignore_errors=True)
            prefix = self.prefix(step, entry.attempt)
            for listed in conditional.list_objects(prefix):
                if listed.name in (MANIFEST, INDEX, STATE):
                    conditional.fetch_copy(join(prefix, listed.name), listed.size, work / listed.name)
            if not (work / MANIFEST).is_file():
                return f"{MANIFEST} is missing"
            if hashlib.sha256((work / MANIFEST).read_bytes()).hexdigest() != entry.manifest_sha256:
                return f"{MANIFEST} is not the one that the fence lists"
            work.rename(folder)
        return None

    def place(self, step: int) -> str:
        """The prefix below which the files of a complete checkpoint lie."""
        return self.prefix(step, self.complete()[step].attempt)


def stored_checkpoints(folder: Path, storage: RunStorage) -> StoredCheckpoints | None:
    """Where a stage's folder `checkpoints` lies on S3; None for a run on this disk."""
    uri = storage.uri_of(folder)
    return StoredCheckpoints(uri) if uri is not None else None


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def attempt_name(attempt: int) -> str:
    return f"attempt-{attempt:03d}"
