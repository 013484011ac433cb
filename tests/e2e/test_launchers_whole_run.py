"""Four real stages under `--launcher local` and `--launcher ray`: controllers killed at every point of the journal, jobs preempted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from e2e_runs import REPOSITORY, command, environment, events, final_bytes, losses, run_to_end
from ray_head import Head, ray_head

HERE = Path(__file__).resolve().parent
STAGES = ["01-projector-warmup", "02-alignment", "03-pretraining", "04-long-context"]
# Decoding in the training process: a worker group starts in half the time.
INLINE = [f"stages.{stage[3:]}.data_loading.engine=inline" for stage in STAGES]
PATIENCE_S = 900.0
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    ended = run_to_end(run_dir, overrides, *INLINE)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    return run_dir


@pytest.fixture(scope="module")
def cluster():
    with ray_head(token=True) as head:
        yield head


def recorded(run_dir: Path, kind: str) -> list[dict]:
    return [event for event in events(run_dir) if event["event"] == kind]


def wait_until(condition: Callable[[], bool], controller: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert controller.poll() is None, f"the controller ended with {controller.returncode}"
        assert time.monotonic() < deadline, f"it did not happen within {PATIENCE_S:.0f} s"
        time.sleep(0.05)


def assert_as_if_undisturbed(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference), "every step once, with the same loss, tokens and samples"
    for stage in STAGES:
        assert final_bytes(run_dir, stage) == final_bytes(reference, stage), f"{stage}: the final weights are equal bit for bit"
    assert [event["stage"] for event in recorded(run_dir, "stage_completed")] == [stage[3:] for stage in STAGES], "no stage twice"
    assert recorded(run_dir, "stage_attempt_failed") == []


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_kill_9_of_the_controller_at_every_point_of_the_journal(
    launcher: str, reference: Path, overrides: list[str], tmp_path: Path, request: pytest.FixtureRequest
):
    run_dir, deaths = tmp_path / "run", tmp_path / "deaths"
    more, variables = [], {}
    if launcher == "ray":
        head: Head = request.getfixturevalue("cluster")
        more, variables = ["--launcher", "ray", "--address", head.address], head.environment
    words = [sys.executable, str(HERE / "mortal_controller.py"), *command(run_dir, [*overrides, *INLINE], *more)[3:]]
    variables = {**environment(), **variables, "KILLED_AT": str(deaths)}
    statuses = []
    while not statuses or statuses[-1] != 0:
        ended = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=PATIENCE_S, cwd=REPOSITORY)
        statuses.append(ended.returncode)
        assert statuses[-1] in (0, -signal.SIGKILL), ended.stderr + ended.stdout
    assert_as_if_undisturbed(run_dir, reference)
    killed = deaths.read_text().splitlines()
    assert len(statuses) == len(killed) + 1
    for stage in (folder[3:] for folder in STAGES):
        for kind in ("stage_attempt_started", "stage_attempt_launched", "stage_completed"):
            assert {f"before {kind} {stage}", f"after {kind} {stage}"} <= set(killed)
    assert {f"{when} {kind}" for when in ("before", "after") for kind in ("run_started", "data_prepared", "run_completed")} <= set(killed)
    # A stage that ends before the controller looks again goes into the journal as completed only, so not in every stage.
    assert {point.rpartition(" ")[0] for point in killed} >= {"before checkpoint_saved", "after checkpoint_saved"}
    print(f"{launcher}: killed at {len(killed)} points")


def test_a_preempted_job_saves_a_checkpoint_and_the_run_ends_as_if_undisturbed(
    cluster: Head, reference: Path, overrides: list[str], tmp_path: Path
):
    """As a user: `ray start --head`, `terrace run --launcher ray`, SIGTERM to the job. Exit 143, a checkpoint, no budget touched."""
    more = ["--launcher", "ray", "--address", cluster.address, "stages.projector-warmup.failure.max_restarts=0",
            "stages.projector-warmup.failure.max_infrastructure_restarts=0"]  # fmt: skip
    with open(tmp_path / "controller.log", "w") as log:
        controller = subprocess.Popen(
            command(tmp_path / "run", [*overrides, *INLINE], *more), env={**environment(), **cluster.environment},
            stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY,
        )  # fmt: skip
    run_dir = tmp_path / "run"
    try:
        wait_until(lambda: bool(_jobs(run_dir)), controller)
        [job] = _jobs(run_dir)
        wait_until(lambda: bool(list(run_dir.glob("stages/01-*/attempts/001/alive-*.json"))), controller)
        job.send_signal(signal.SIGTERM)
        wait_until(lambda: bool(recorded(run_dir, "stage_attempt_preempted")), controller)
        [stopped] = recorded(run_dir, "stage_attempt_preempted")
        assert (stopped["stage"], stopped["attempt"]) == ("projector-warmup", 1)
        assert list((run_dir / "stages" / STAGES[0] / "checkpoints").glob("step-*/manifest.json"))
        assert controller.wait(timeout=2 * PATIENCE_S) == 0, (tmp_path / "controller.log").read_text()
    finally:
        if controller.poll() is None:
            os.killpg(controller.pid, signal.SIGKILL)
    assert_as_if_undisturbed(run_dir, reference)
    status = subprocess.check_output([sys.executable, "-m", "terrace.cli", "status", str(run_dir), "--json"], env=environment())
    failures = json.loads(status)["stages"][0]["failures"]
    assert (failures["preemptions"], failures["program"], failures["infrastructure"]) == (1, 0, 0)
    assert _exit_status(cluster, run_dir) == 143


def _jobs(run_dir: Path) -> list[psutil.Process]:
    """The programs of this run's jobs (not the shells that started them)."""
    found = {process: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return [process for process, words in found.items() if {"--attempt", str(run_dir)} <= set(words)]


def _exit_status(cluster: Head, run_dir: Path) -> int:
    """What Ray says of the preempted job."""
    code = "import sys; from ray.job_submission import JobSubmissionClient as C\n" \
           "print([j.driver_exit_code for j in C(sys.argv[1]).list_jobs() if (j.metadata or {}).get('terrace_run') == sys.argv[2]" \
           " and j.metadata['attempt'] == '1' and j.metadata['stage'] == 'projector-warmup'][0])"  # fmt: skip
    words = [sys.executable, "-c", code, cluster.address, str(run_dir)]
    return int(subprocess.check_output(words, env=cluster.environment, text=True))


def test_without_the_token_the_cluster_refuses(cluster: Head, overrides: list[str], tmp_path: Path):
    without = {key: value for key, value in {**environment(), **cluster.environment}.items() if not key.startswith("RAY_AUTH")}
    words = command(tmp_path / "run", [*overrides, *INLINE], "--launcher", "ray", "--address", cluster.address)
    ended = subprocess.run(words, env=without, capture_output=True, text=True, timeout=PATIENCE_S, cwd=REPOSITORY)
    assert ended.returncode in (1, 2)
    assert "RAY_AUTH_TOKEN" in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
