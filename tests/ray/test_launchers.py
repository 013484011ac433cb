"""The local and the Ray Jobs launchers with a stage that only counts: endings, stops, and controllers that die.

One Ray of our own for the jobs, in a folder of its own, so that nothing else on this machine takes it for its cluster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fakes import fake_stage, tiny_recipe

from terrace.cluster.attempt import LaunchRequest, stage_directory
from terrace.cluster.heartbeat import live_processes
from terrace.cluster.local import LocalLauncher

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def finish(launcher: LocalLauncher, attempt: int):
    wait_until(lambda: launcher.observe(0, "stage-a", attempt).status != "running")
    return launcher.observe(0, "stage-a", attempt)


@pytest.mark.slow
def test_how_attempts_end(ray_cluster, tmp_path: Path):
    """Program failure, wrong input, a worker's death, a stop with a checkpoint, success: each is told apart, in one line."""
    import fakes

    # The shared cluster's workers do not have the tests' folder on their path: the stage travels whole.
    ray_cluster.cloudpickle.register_pickle_by_value(fakes)
    recipe = tiny_recipe(1, steps=400)
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
    wait_until(lambda: (launcher.observe(0, "stage-a", 4).step or 0) >= 3)
    assert len(live_processes(tmp_path)) == 1
    launcher.stop(0, "stage-a", 4, "test", force=False)
    assert finish(launcher, 4).status == "preempted"
    assert live_processes(tmp_path) == []
    steps = len((folder / "metrics.jsonl").read_text().splitlines())
    launcher.launch(LaunchRequest(0, "stage-a", 5, tmp_path))
    wait_until(lambda: (launcher.observe(0, "stage-a", 5).step or 0) > steps)
    launcher.stop(0, "stage-a", 5, "test", force=True)
    assert finish(launcher, 5).failure == "infrastructure"
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1))


# ---------------------------------------------------------------- Ray Jobs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    """`ray start --head` on ports of its own; its dashboard's address."""
    temporary = Path(f"/tmp/tr{os.getpid()}")  # Ray's sockets need a short path
    port, dashboard = 20000 + os.getpid() % 20000, 40000 + os.getpid() % 20000
    ray = str(Path(sys.executable).with_name("ray"))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": f"{REPOSITORY / 'platform'}:{REPOSITORY / 'tests'}",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    process = subprocess.Popen(
        [ray, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4", "--include-dashboard=true",
         "--disable-usage-stats", f"--temp-dir={temporary}", f"--object-store-memory={200 * 2**20}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    from ray.job_submission import JobSubmissionClient

    def answers() -> bool:
        assert process.poll() is None, "ray start ended"
        try:
            JobSubmissionClient(address).list_jobs()
        except Exception:
            return False
        return True

    wait_until(answers)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


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
    controller = start_controller(tmp_path, cluster, 100)
    wait_until(lambda: len(steps_of(tmp_path, "stage-a")) >= 3)
    os.killpg(controller.pid, signal.SIGKILL)
    controller.wait()
    at_kill = len(steps_of(tmp_path, "stage-a"))
    wait_until(lambda: len(steps_of(tmp_path, "stage-a")) > at_kill + 3)  # nobody controls it, it trains on
    controller = start_controller(tmp_path, cluster, 100)
    wait_until(lambda: count(tmp_path, "stage_completed") == 1)
    assert [event["attempt"] for event in events(tmp_path) if event["event"] == "stage_attempt_started"][:1] == [1]
    wait_until(lambda: len(steps_of(tmp_path, "stage-b")) >= 3)
    job = next(p for p in __import__("psutil").process_iter(["cmdline"])
               if str(tmp_path) in " ".join(p.info["cmdline"] or []) and "--stage stage-b" in " ".join(p.info["cmdline"] or [])
               and "bash" not in (p.info["cmdline"] or [""])[0] and Path((p.info["cmdline"] or [""])[0]).name != "sh")  # fmt: skip
    job.send_signal(signal.SIGTERM)
    wait_until(lambda: count(tmp_path, "stage_attempt_preempted") == 1)
    assert controller.wait(timeout=180) == 0, (tmp_path / "controller.log").read_text()
    for stage in ("stage-a", "stage-b"):
        assert steps_of(tmp_path, stage) == list(range(1, 101)), "no step lost or repeated"
    assert count(tmp_path, "stage_attempt_failed") == 0
    assert count(tmp_path, "stage_completed") == 2
