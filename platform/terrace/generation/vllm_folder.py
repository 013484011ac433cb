"""Directories that vLLM reads: a private one for the policy of an RL stage, and a view of a model with other image bounds.

A private directory has an unpredictable name and is readable by its owner alone, since it lies where every user of the
machine may write and vLLM loads what it finds there. It is locked while its process lives, so that what a killed process
left (a whole copy of the weights) is removed by the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

from terrace.errors import InputError
from terrace.families.interface import MAX_ASPECT_RATIO, Bounds, Family

PREFIX = "terrace-rollout-weights-"
WRITTEN_HERE = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class PrivateFolder:
    """A directory of this process on the machine's own disk (`TMPDIR`), until `close` or the process's end."""

    def __init__(self) -> None:
        remove_abandoned()
        self._make()
        while not self.path.exists():  # taken for abandoned by another process before it was locked
            os.close(self._lock)
            self._make()

    def _make(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))  # mode 0700
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove it. May be called twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_abandoned() -> None:
    """Remove this user's private directories whose processes are gone."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # gone by now, no directory, or another user's
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(lock)


def settled_bounds(family: Family, most_pixels: int) -> Bounds:
    """(min, max) pixels within which a picture that was resized within any bounds up to `most_pixels` stays as it is.

    A very long picture is at least one unit high, so it may have more than `most_pixels`.
    """
    return family.unit, max(most_pixels, MAX_ASPECT_RATIO * family.unit)


def with_bounds(model: Path, family: Family, bounds: Bounds, folder: Path) -> Path:
    """`folder`, made to hold the files of a model directory as links, but image preprocessing with these bounds."""
    if not (model / "config.json").is_file():
        raise InputError(f"{model}: no model directory (it has no config.json)")
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file() and file.name not in WRITTEN_HERE:
            (folder / file.name).symlink_to(file.resolve())
    for name, values in zip(WRITTEN_HERE, (family.preprocessor(bounds), family.processor())):
        if values:
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    return folder
