"""A process killed while torch compiles an extension leaves a lock; the next one must not wait for it for ever."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from torch.utils.file_baton import FileBaton

from terrace.train.strategies.build_locks import remove_abandoned_locks

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_is_removed_once_its_maker_is_dead_and_not_before(tmp_path: Path):
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        later = time.time() + 60
        assert remove_abandoned_locks(tmp_path, later) == []
    finally:
        process.kill()
        process.wait()
    assert remove_abandoned_locks(tmp_path, later) == [lock]
    FileBaton(str(lock)).wait()  # returns


def test_a_folder_without_locks_or_none_at_all_is_nothing(tmp_path: Path):
    assert remove_abandoned_locks(tmp_path) == [] == remove_abandoned_locks(tmp_path / "none")
