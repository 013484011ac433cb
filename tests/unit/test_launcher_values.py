"""Launchers without a Ray: jobs that a cluster does not accept yet or never, and reports of an attempt that was overtaken."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fakes import tiny_recipe

from terrace.cluster import heartbeat, ray_jobs, seen
from terrace.cluster.attempt import LaunchRequest
from terrace.cluster.attempt_files import Fenced, claim_attempt, read_json
from terrace.cluster.attempt_outcome import progress_time
from terrace.cluster.local_worker import process_group_backend, reporter
from terrace.cluster.ray_jobs import ClusterUnreachable, RayJobsLauncher

NOT_YET = "Request failed with status code 500: No available agent to submit job, please try again later.."


@pytest.mark.parametrize(("strategy", "offload", "gpus", "expected"), [
    ("fsdp", {"offload_parameters": "cpu"}, 1, "cuda:nccl,cpu:gloo"), ("fsdp", {"offload_optimizer": "cpu"}, 0, None),
    ("fsdp", {}, 1, None), ("zero2", {"offload_optimizer": "cpu"}, 1, None),
])  # fmt: skip
def test_shards_on_the_host_have_a_process_group_of_both_devices(strategy, offload, gpus, expected):
    parallel = {"strategy": strategy, **offload}
    stage = tiny_recipe(1, parallel=parallel, resources={"workers": 2, "gpus_per_worker": gpus}).stages[0]
    assert process_group_backend(stage) == expected


class Dashboard:
    """A client that is refused with each of the errors in turn, then accepted."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.jobs = list(errors), set()

    def submit_job(self, submission_id: str, **_: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.jobs.add(submission_id)

    def get_job_info(self, job: str) -> SimpleNamespace:
        if job not in self.jobs:
            raise RuntimeError(f"Job {job} does not exist (404)")
        return SimpleNamespace(status="RUNNING", message="")


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayJobsLauncher:
    monkeypatch.setattr(ray_jobs, "LOOK_SECONDS", 0.0)
    made = RayJobsLauncher("http://127.0.0.1:1")
    made._run_dir = tmp_path
    return made


def launch(launcher: RayJobsLauncher) -> str:
    launcher.launch(LaunchRequest(0, tiny_recipe(1).stages[0].name, 1, launcher._run_dir))
    return launcher.observe(0, "stage-a", 1).status


def test_a_cluster_that_is_not_ready_is_asked_again(launcher: RayJobsLauncher):
    launcher._client = Dashboard(RuntimeError(NOT_YET), ConnectionError("refused"))
    assert [launch(launcher) for _ in range(3)] == ["absent", "absent", "running"]
    assert launch(launcher) == "running", "the same request again adopts the job"


def test_a_cluster_that_stays_so_is_named(launcher: RayJobsLauncher, monkeypatch: pytest.MonkeyPatch):
    launcher._client = Dashboard(*[RuntimeError(NOT_YET)] * 2)
    assert launch(launcher) == "absent"
    monkeypatch.setattr(ray_jobs, "SUBMIT_PATIENCE_SECONDS", -1.0)
    with pytest.raises(ClusterUnreachable, match=r"127\.0\.0\.1:1: the job terrace-.* was not accepted: .*No available agent"):
        launch(launcher)


def test_a_job_that_is_refused_for_good_is_not_asked_again(launcher: RayJobsLauncher):
    launcher._client = Dashboard(RuntimeError("Request failed with status code 400: wrong runtime_env"))
    with pytest.raises(ClusterUnreachable, match="wrong runtime_env"):
        launch(launcher)


def test_an_overtaken_attempt_does_not_overwrite_the_newer_ones_progress(tmp_path: Path):
    claim_attempt(tmp_path, 1)
    old = reporter(tmp_path, rank=0, attempt=1)
    old({"step": 2}, None)
    claim_attempt(tmp_path, 2)
    reporter(tmp_path, rank=0, attempt=2)({"step": 5}, None)
    with pytest.raises(Fenced, match="attempt 2"):
        old({"step": 4}, None)
    assert read_json(tmp_path / "progress.json")["step"] == 5


@pytest.mark.parametrize("skew", [0.0, -3600.0, 3600.0], ids=["same", "behind", "ahead"])
def test_another_machine_s_clock_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float):
    """A worker lives as long as its heartbeat changes here, and progress counts from the change that was seen, whatever its clock says."""
    now = 1_000_000.0
    monkeypatch.setattr(seen.time, "time", lambda: now)
    alive = tmp_path / "stages" / "01-a" / "attempts" / "001" / "alive-0000.json"
    alive.parent.mkdir(parents=True)
    worker = {"stage": "a", "attempt": 1, "rank": 0, "host": "elsewhere", "pid": 1, "started": 0.0, "node_id": ""}
    alive.write_text(json.dumps(worker))
    metrics = tmp_path / "stages" / "01-a" / "metrics.jsonl"
    metrics.write_text("{}")
    for file in (alive, metrics):
        os.utime(file, (now + skew, now + skew))

    def lives() -> bool:
        return bool(heartbeat.live_processes(tmp_path))

    assert lives()
    assert progress_time(metrics.parent) == now
    now += heartbeat.DEAD_AFTER_SECONDS - 1
    assert lives()
    os.utime(alive, (now + skew, now + skew))  # it beats
    assert lives()
    now += heartbeat.DEAD_AFTER_SECONDS - 1
    assert lives()
    now += 2
    assert not lives()
    assert progress_time(metrics.parent) == 1_000_000.0
    os.utime(metrics, (now + skew, now + skew))
    assert progress_time(metrics.parent) == now
    alive.unlink()
    metrics.unlink()
    assert not lives()
    assert progress_time(metrics.parent) is None


def test_one_heartbeat_stands_for_all_workers_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """256 workers on 32 machines, of which one each beats where a storage lies in between; a machine none of whose workers do is dead."""
    now = 1_000_000.0
    monkeypatch.setattr(seen.time, "time", lambda: now)
    folder = tmp_path / "stages" / "01-a" / "attempts" / "001"
    folder.mkdir(parents=True)
    files = [folder / f"alive-{rank:04d}.json" for rank in range(256)]
    for rank, file in enumerate(files):
        worker = {"stage": "a", "attempt": 1, "rank": rank, "host": f"machine-{rank // 8}", "pid": 1, "started": 0.0, "node_id": ""}
        file.write_text(json.dumps(worker))
        os.utime(file, (now, now))
    assert len(heartbeat.live_processes(tmp_path)) == 256
    now += heartbeat.DEAD_AFTER_SECONDS + 1
    for file in files[3:-8:8]:
        os.utime(file, (now, now))
    assert [process.rank for process in heartbeat.live_processes(tmp_path)] == list(range(248))
    now += heartbeat.DEAD_AFTER_SECONDS + 1
    assert heartbeat.live_processes(tmp_path) == []
