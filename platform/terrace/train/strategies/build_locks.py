"""Locks of torch's compiled extensions that nobody holds any more.

DeepSpeed has torch compile an extension on first use, behind a lock file that the compiling process makes and removes
(`torch.utils.file_baton`). A process killed in between leaves the file, and every later process on the machine waits for it for ever,
without a word.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

LOGGER = logging.getLogger(__name__)
OLDEST_SECONDS = 1_800.0  # of a lock whose holder this machine does not see (a home folder that machines share)
YOUNGEST_SECONDS = 1.0  # the holder opens the file when it makes it; nothing is decided in that moment


def build_root() -> Path:
    """Where torch builds: TORCH_EXTENSIONS_DIR, or a folder in the user's cache."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def remove_abandoned_locks(root: Path, now: float | None = None) -> list[Path]:
    """Remove the locks below `root` that no process holds open, and return them. Locks of other machines are left for half an hour."""
    removed = []
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        with contextlib.suppress(OSError):  # somebody else removes it too, or may not be asked
            age = (time.time() if now is None else now) - lock.stat().st_mtime
            if age < YOUNGEST_SECONDS or _is_held(lock) or (_is_shared(root) and age < OLDEST_SECONDS):
                continue
            lock.unlink()
            removed.append(lock)
            LOGGER.warning("%s: removed; it was left by a process that was killed while torch compiled", lock)
    return removed


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as its maker has until it is done."""
    wanted = os.stat(lock)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = os.stat(link)
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _is_shared(root: Path) -> bool:
    """Whether other machines may see this folder: it lies on a network's file system by /proc/mounts, or there is no such table."""
    if not os.path.exists("/proc/mounts"):
        return True
    best, kind = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, form, *_ = line.split()
        if os.path.commonpath([place, root]) == place and len(place) >= len(best):
            best, kind = place, form
    return kind.startswith(("nfs", "lustre", "fuse", "ceph", "gpfs", "beegfs", "cifs", "smb", "afs", "9p", "virtiofs", "gluster"))
