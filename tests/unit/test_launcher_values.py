"""Launchers without a Ray: jobs that a cluster does not accept yet or never, and reports of an attempt that was overtaken."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fakes import tiny_recipe

from terrace.cluster import ray_jobs
from terrace.cluster.attempt import LaunchRequest
from terrace.cluster.attempt_files import Fenced, claim_attempt, read_json
from terrace.cluster.local_worker import reporter
from terrace.cluster.ray_jobs import ClusterUnreachable, RayJobsLauncher

NOT_YET = "Request failed with status code 500: No available agent to submit job, please try again later.."


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
