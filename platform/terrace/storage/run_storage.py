"""What training needs of the place where its run lives, as one value that is handed in: nothing on this disk, or S3 behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from terrace.storage import conditional, mirror
from terrace.storage.follower import patiently


class RunStorage(Protocol):
    """Of one run directory. Paths are those on this machine."""

    def uri_of(self, path: Path) -> str | None:
        """Where a folder of the run lies on S3, whose checkpoints are then completed by a conditional write of their fence
        object (train.checkpoint_storage); None where this disk is all there is."""

    def fetch_final(self, folder: Path, tensors: bool = True) -> None:
        """Bring a stage's `final/` here, whole or not at all, if it is not here. Without its `tensors` the folder says where they lie,
        and whoever reads weights reads there what it needs (models.tensor_files)."""

    def store_file(self, file: Path, folder: Path) -> None:
        """Give one file of a `final/` to the other machines, under that folder's name; it counts when the folder is published."""

    def publish_final(self, folder: Path) -> None:
        """Give a stage's `final/` to the other machines: what lies in this folder, beside what was stored of it by `store_file`."""

    def flush(self, path: Path) -> None:
        """Store what was written below the run of `path` by now."""


class OnThisDisk:
    """A run whose folder every worker shares: there is nothing to bring or give."""

    def uri_of(self, path: Path) -> str | None:
        return None

    def fetch_final(self, folder: Path, tensors: bool = True) -> None:
        """It is here."""

    def store_file(self, file: Path, folder: Path) -> None:
        """It is where it stays."""

    def publish_final(self, folder: Path) -> None:
        """It is there."""

    def flush(self, path: Path) -> None:
        """Files are where they stay."""


class Mirrored:
    """A run on S3 whose small files follow the storage meanwhile (storage.mirror), and which waits for a storage that is away."""

    def uri_of(self, path: Path) -> str | None:
        return mirror.uri_of(path)

    def fetch_final(self, folder: Path, tensors: bool = True) -> None:
        patiently(lambda: mirror.fetch_folder(folder, mirror.FINAL_LAST, tensors))

    def store_file(self, file: Path, folder: Path) -> None:
        patiently(lambda: conditional.store_copy(file, f"{mirror.uri_of(folder)}/{file.name}"))

    def publish_final(self, folder: Path) -> None:
        patiently(lambda: mirror.store_folder(folder, mirror.FINAL_LAST))

    def flush(self, path: Path) -> None:
        patiently(lambda: mirror.flush(path))


def run_storage(run_dir: Path) -> RunStorage:
    """The storage of a run directory on this machine (`mirror.open_run` made it, if it is a stored one's)."""
    return Mirrored() if mirror.uri_of(run_dir) is not None else OnThisDisk()
