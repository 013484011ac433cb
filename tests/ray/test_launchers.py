"""The local and the Ray Jobs launchers with a stage that only counts: endings, stops, and controllers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fakes import fake_stage, tiny_recipe
from ray_head import ray_head

from terrace.cluster.attempt import LaunchRequest
from terrace.cluster.attempt_files import write_atomic
from terrace.cluster.heartbeat import live_processes
from terrace.cluster.local import LocalLauncher
from terrace.storage.run_layout import stage_directory

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]  # seconds on an idle machine, minutes on a busy one


def hold(run_dir: Path, stage: str, step: int) -> None:
    """Let the stage count up to this step and no further: what a test waits for then lasts until the test goes on."""
    write_atomic(run_dir / f"hold-{stage}", str(step + 1))


def wait_until(condition, seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def finish(launcher: LocalLauncher, attempt: int):
    wait_until(lambda: launcher.observe(0, "stage-a", attempt).status != "running")
    return launcher.observe(0, "stage-a", attempt)


def test_ray_train_starts_no_actor_that_has_nothing_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor has Ray renamed what is left out: its own trainer still has both, and a cluster keeps the cleaner."""
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    from terrace.cluster.local import _trainer, needless_callbacks

    def names(trainer) -> set[str]:
        return {type(one).__name__ for one in trainer._create_default_callbacks()}

    trainer = _trainer(tiny_recipe(1, steps=1), LaunchRequest(0, "stage-a", 1, tmp_path), fake_stage)
    of_ray = {type(one).__name__ for one in super(type(trainer), trainer)._create_default_callbacks()}
    assert of_ray - names(trainer) == needless_callbacks() == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert of_ray - names(trainer) == {"DatasetsCallback"}


@pytest.mark.slow
def test_how_attempts_end(ray_cluster, tmp_path: Path):
    """Program failure, wrong input, a worker's death, a stop with a checkpoint, success: each is told apart, in one line."""
    import fakes

    # The shared cluster's workers do not have the tests' folder on their path: the stage travels whole.
    ray_cluster.cloudpickle.register_pickle_by_value(fakes)
    recipe = tiny_recipe(1, steps=20)
    hold(tmp_path, "stage-a", 3)
    launcher = LocalLauncher(recipe, fake_stage)
    launcher.attach(tmp_path)
    folder = stage_directory(tmp_path, 0, "stage-a")
    assert launcher.observe(0, "stage-a", 1).status == "absent"
    for attempt, what in enumerate(["program", "input", "die"], start=1):
        (tmp_path / f"fail-stage-a-{attempt}").write_text(what)
        launcher.launch(LaunchRequest(0, "stage-a", attempt, tmp_path))
        assert launcher.live_attempts() == [("stage-a", attempt)]
        seen = finish(launcher, attempt)
        assert (seen.status, seen.live) == ("failed", False)
        assert seen.failure == {"program": "program", "input": "input", "die": "infrastructure"}[what]
        assert "\n" not in seen.message
        if what != "die":
            assert "told to fail at step 1" in seen.message
    launcher.launch(LaunchRequest(0, "stage-a", 4, tmp_path))
    wait_until(lambda: launcher.observe(0, "stage-a", 4).step == 3)
    assert len(live_processes(tmp_path)) == 1
    launcher.stop(0, "stage-a", 4, "test", force=False)
    assert finish(launcher, 4).status == "preempted"
    assert live_processes(tmp_path) == []
    hold(tmp_path, "stage-a", 6)
    launcher.launch(LaunchRequest(0, "stage-a", 5, tmp_path))
    wait_until(lambda: launcher.observe(0, "stage-a", 5).step == 6)
    launcher.stop(0, "stage-a", 5, "test", force=True)
    assert finish(launcher, 5).failure == "infrastructure"
    (tmp_path / "hold-stage-a").unlink()
    launcher.launch(LaunchRequest(0, "stage-a", 6, tmp_path))
    assert finish(launcher, 6).status == "succeeded"
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 21))


# ---------------------------------------------------------------- Ray Jobs


@pytest.fixture(scope="module")
def cluster():
    with ray_head() as head:
        yield head.address


CONTROLLER = """
import sys
from pathlib import Path
from fakes import tiny_recipe
from terrace.cluster.ray_jobs import RayJobsLauncher
from terrace.curriculum.run import run_curriculum
from terrace.track.progress import Display
recipe = tiny_recipe(2, steps=int(sys.argv[3]))
launcher = RayJobsLauncher(sys.argv[2], [sys.executable, "-m", "fakes"])
outcome = run_curriculum(recipe, Path(sys.argv[1]), launcher, Display(), prepare=lambda *_: {})
print(outcome.phase, outcome.message)
sys.exit(outcome.exit_status)
"""


def start_controller(run_dir: Path, address: str, steps: int = 40) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'platform'}:{REPOSITORY / 'tests'}"}
    environment.pop("RAY_ADDRESS", None)
    log = open(run_dir / "controller.log", "a")  # noqa: SIM115 (the process keeps it)
    return subprocess.Popen([sys.executable, "-c", CONTROLLER, str(run_dir), address, str(steps)], env=environment,
                            stdout=log, stderr=log, start_new_session=True)  # fmt: skip


def events(run_dir: Path) -> list[dict]:
    path = run_dir / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def count(run_dir: Path, kind: str) -> int:
    return sum(event["event"] == kind for event in events(run_dir))


def steps_of(run_dir: Path, stage: str) -> list[int]:
    path = next(run_dir.glob(f"stages/*-{stage}/metrics.jsonl"), None)
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path else []


@pytest.mark.slow
def test_jobs_survive_their_controller_and_stop_with_a_checkpoint(cluster: str, tmp_path: Path):
    """kill -9 of the controller: the job goes on and is adopted. SIGTERM to the job: a new attempt by itself. Then to the end."""
    hold(tmp_path, "stage-a", 3)
    hold(tmp_path, "stage-b", 3)
    controller = start_controller(tmp_path, cluster, 10)
    wait_until(lambda: len(steps_of(tmp_path, "stage-a")) == 3)
    os.killpg(controller.pid, signal.SIGKILL)
    controller.wait()
    hold(tmp_path, "stage-a", 6)
    wait_until(lambda: len(steps_of(tmp_path, "stage-a")) == 6)  # nobody controls it, it trains on
    controller = start_controller(tmp_path, cluster, 10)
    wait_until(lambda: count(tmp_path, "controller_started") == 1)
    (tmp_path / "hold-stage-a").unlink()
    wait_until(lambda: count(tmp_path, "stage_completed") == 1)
    assert count(tmp_path, "stage_attempt_started") <= 2, "stage-a was adopted, not started again"
    wait_until(lambda: len(steps_of(tmp_path, "stage-b")) == 3)
    words = {process: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    [job] = [process for process, line in words.items() if {"fakes", str(tmp_path), "stage-b"} <= set(line)]
    job.send_signal(signal.SIGTERM)
    wait_until(lambda: count(tmp_path, "stage_attempt_preempted") == 1)
    (tmp_path / "hold-stage-b").unlink()
    assert controller.wait(timeout=400) == 0, (tmp_path / "controller.log").read_text()
    for stage in ("stage-a", "stage-b"):
        assert steps_of(tmp_path, stage) == list(range(1, 11)), "no step lost or repeated"
    assert count(tmp_path, "stage_attempt_failed") == 0
    assert count(tmp_path, "stage_completed") == 2
