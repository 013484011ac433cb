"""What training needs of the place where its run lives, as one value that is handed in: nothing on this disk, or S3 behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from terrace.storage import mirror


class RunStorage(Protocol):
    """Of one run directory. Paths are those on this machine."""

    def uri_of(self, path: Path) -> str | None:
        """Where a folder of the run lies on S3, whose checkpoints are then completed by a conditional write of their fence
        object (train.checkpoint_storage); None where this disk is all there is."""

    def fetch_final(self, folder: Path) -> None:
        """Bring a stage's `final/` here, whole or not at all, if it is not here."""

    def publish_final(self, folder: Path) -> None:
        """Give a stage's `final/` to the other machines, whole or not at all."""

    def flush(self, path: Path) -> None:
        """Store what was written below the run of `path` by now."""


class OnThisDisk:
    """A run whose folder every worker shares: there is nothing to bring or give."""

    def uri_of(self, path: Path) -> str | None:
        return None

    def fetch_final(self, folder: Path) -> None:
        """It is here."""

    def publish_final(self, folder: Path) -> None:
        """It is there."""

    def flush(self, path: Path) -> None:
        """Files are where they stay."""


class Mirrored:
    """A run on S3 whose small files follow the storage meanwhile (storage.mirror)."""

    def uri_of(self, path: Path) -> str | None:
        return mirror.uri_of(path)

    def fetch_final(self, folder: Path) -> None:
        mirror.fetch_folder(folder, mirror.FINAL_LAST)

    def publish_final(self, folder: Path) -> None:
        mirror.store_folder(folder, mirror.FINAL_LAST)

    def flush(self, path: Path) -> None:
        mirror.flush(path)


def run_storage(run_dir: Path) -> RunStorage:
    """The storage of a run directory on this machine (`mirror.open_run` made it, if it is a stored one's)."""
    return Mirrored() if mirror.uri_of(run_dir) is not None else OnThisDisk()
