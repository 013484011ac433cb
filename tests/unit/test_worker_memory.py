"""A process that keeps freed memory touches no new page when it allocates the same again."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from packs import tiny_recipe

from terrace.curriculum import attempt_worker
from terrace.worker import memory
from terrace.worker.memory import keep_freed_memory

PROBE = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep":
    from terrace.worker.memory import keep_freed_memory
    assert keep_freed_memory()
def once():
    blocks = [libc.malloc(8 * 2**20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 8 * 2**20)
    for block in blocks:
        libc.free(block)
for _ in range(3):
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kind: str) -> int:
    return int(subprocess.run([sys.executable, "-c", PROBE, kind], capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_memory_that_was_freed_is_used_again():
    pages_of_one_turn = 4 * 8 * 2**20 // 4096
    assert faults("plain") > 4 * pages_of_one_turn
    assert faults("keep") < pages_of_one_turn / 10


def test_without_glibc_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False


@pytest.mark.parametrize(("device", "kept"), [("cpu", [1]), ("cuda:0", [])])
def test_training_processes_on_a_cpu_keep_theirs(device, kept, monkeypatch, tmp_path):
    calls: list[int] = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(attempt_worker, "run_stage", lambda *_: None)
    attempt_worker.run_in_worker(
        tiny_recipe(), 0, tmp_path, 1, rank=0, world_size=1, local_rank=0, device=device, report=print, should_stop=lambda: None
    )
    assert calls == kept
