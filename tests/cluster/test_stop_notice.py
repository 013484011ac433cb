"""The preStop hook with real processes: a pod goes when all of its ranks have answered, not before, and not for the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from cluster_world import ROOT
from waiting import eventually

from terrace.cluster import stop_notice

RANK = """
import sys, time
from pathlib import Path
from terrace.cluster import stop_notice
rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
time.sleep(float(sys.argv[4]))
stop_notice.begin()
(folder / f"began-{rank}").touch()
while not stop_notice.requested():
    time.sleep(0.02)
time.sleep(0.1 * rank)  # its part of the checkpoint takes longer than that of the rank before
(folder / f"shard-{rank}").touch()
while rank == 0 and len(list(folder.glob("shard-*"))) < ranks:
    time.sleep(0.02)
if rank == 0:
    (folder / "manifest").touch()
stop_notice.answer()
time.sleep(60)  # Ray keeps its workers until somebody ends them
"""


@pytest.fixture
def pod(monkeypatch, tmp_path):
    """A pod's scratch folder, and its ranks, ended afterwards."""
    monkeypatch.setenv("TERRACE_STOP_FILE", str(tmp_path / "stop"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/platform")
    ranks: list[subprocess.Popen] = []

    def start(number, of, late=0.0):
        words = [sys.executable, "-c", RANK, str(number), str(of), str(tmp_path), str(late)]
        ranks.append(subprocess.Popen(words))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.kill()
        rank.wait()


def kubelet_stops(ranks, grace_seconds, hook_seconds):
    """What the kubelet does with a pod that must go: the hook to its end, then SIGTERM, all within the grace period, then SIGKILL."""
    started = time.monotonic()
    words = [sys.executable, "-m", "terrace.cluster.stop_notice", "--wait-seconds", str(hook_seconds)]
    hook = subprocess.run(words, timeout=grace_seconds, capture_output=True, text=True)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    for rank in ranks:
        try:
            rank.wait(max(grace_seconds - (time.monotonic() - started), 0.01))
        except subprocess.TimeoutExpired:
            rank.kill()
    return hook, time.monotonic() - started


def test_hook_waits_for_all_eight_ranks_and_the_manifest(pod, tmp_path):
    ranks = [pod(number, 8) for number in range(8)]
    assert eventually(lambda: len(list(tmp_path.glob("began-*"))) == 8)
    hook, seconds = kubelet_stops(ranks, grace_seconds=30, hook_seconds=20)
    assert hook.returncode == 0, hook.stderr
    assert (tmp_path / "manifest").exists()
    assert len(list(tmp_path.glob("shard-*"))) == 8
    assert 0.7 <= seconds < 20


def test_a_late_rank_keeps_the_notice_and_is_waited_for(pod, tmp_path):
    ranks = [pod(0, 2), pod(1, 2, late=1.0)]
    assert eventually(lambda: (tmp_path / "began-0").exists())
    hook, _ = kubelet_stops(ranks, grace_seconds=30, hook_seconds=20)  # rank 0 cannot end before rank 1 has begun and saved
    assert hook.returncode == 0, hook.stderr
    assert (tmp_path / "manifest").exists()
    assert stop_notice.notice_file().exists()


def test_a_rank_that_died_is_not_waited_for_and_one_that_hangs_ends_the_wait_with_its_name(pod, tmp_path):
    dead, hangs = pod(1, 3), pod(0, 3)  # rank 0 waits for shards that never come
    assert eventually(lambda: len(list(tmp_path.glob("began-*"))) == 2)
    dead.kill()
    dead.wait()
    assert stop_notice.unanswered() == [hangs.pid]
    hook, _ = kubelet_stops([hangs], grace_seconds=10, hook_seconds=1)
    assert hook.returncode == 1
    assert f"processes {hangs.pid} have not saved within 1 s" in hook.stderr


def test_nobody_trains_here(monkeypatch, tmp_path):
    monkeypatch.setenv("TERRACE_STOP_FILE", str(tmp_path / "stop"))
    assert stop_notice.requested() is None
    started = time.monotonic()
    assert stop_notice.wait(5.0) == []
    assert time.monotonic() - started < 1.0
    assert stop_notice.requested()


def test_a_notice_to_an_earlier_run_of_the_container_is_none(monkeypatch, tmp_path):
    """An emptyDir outlives a container that is restarted in its pod; its first process does not."""
    monkeypatch.setenv("TERRACE_STOP_FILE", str(tmp_path / "stop"))
    (tmp_path / "stop").write_text("1234567")
    assert stop_notice.requested() is None
    folder = tmp_path / "stop-active"
    folder.mkdir()
    (folder / str(os.getpid())).write_text("1234567")  # a process of that number, but an earlier one
    assert stop_notice.unanswered() == []
