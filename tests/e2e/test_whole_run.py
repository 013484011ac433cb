"""Four stages by the command itself: they finish and learn, and a run that was killed anywhere ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from e2e_runs import command, environment, events, final_bytes, kill_when, losses, run_to_end

STAGES = ["01-projector-warmup", "02-alignment", "03-pretraining", "04-long-context"]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
# Long enough to be killed in the middle of the first stage.
LONGER = ["stages.projector-warmup.budget.steps=40", "stages.alignment.budget.steps=16"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    """The run that nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    ended = run_to_end(run_dir, overrides, *LONGER)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert ended.stderr == "", "Ray and its friends are not heard"
    assert len(ended.stdout.splitlines()) < 60
    return run_dir


def test_all_stages_finish_and_learn(reference: Path, overrides: list[str]):
    status = json.loads(
        subprocess.check_output([sys.executable, "-m", "terrace.cli", "status", str(reference), "--json"], env=environment())
    )
    assert status["phase"] == "succeeded"
    for stage in status["stages"]:
        before, after = stage["evaluation"]["before"], stage["evaluation"]["after"]
        assert before
        # The second stage trains around a language model that is random and frozen: the first has got out of it what there is.
        most = 1.01 if stage["name"] == "alignment" else 1.0
        assert all(after[kind] < most * before[kind] for kind in before), f"{stage['name']} learned on held-out samples of every kind"
        assert stage["final"]
        assert stage["step"] == stage["total_steps"]
    recorded = [event["event"] for event in events(reference)]
    assert recorded.count("stage_completed") == 4
    assert recorded.count("handed_over") == 3
    assert recorded[-1] == "run_completed"


def test_the_same_command_on_a_finished_run_does_nothing(reference: Path, overrides: list[str]):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    ended = run_to_end(reference, overrides, *LONGER)
    assert ended.returncode == 0
    assert "complete" in ended.stdout
    after = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    assert after == before


def test_a_changed_recipe_is_refused_by_key(reference: Path, overrides: list[str]):
    ended = run_to_end(reference, overrides, *LONGER, "stages.alignment.train.vision.lr=0.5", "model.seed=3")
    assert ended.returncode == 2
    assert "stages.1.train.vision.lr" in ended.stderr.splitlines()[0]
    assert "model.seed" in ended.stderr


def test_mlflow_has_every_step_once(reference: Path):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{reference}/mlflow.db")
    experiment = client.get_experiment_by_name("terrace")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    assert len(runs) == 5
    stages = {run.data.tags["terrace.stage"]: run for run in runs if run not in parents}
    for folder, rows in losses(reference).items():
        history = client.get_metric_history(stages[folder[3:]].info.run_id, "loss")
        assert sorted((point.step, point.value) for point in history) == [(step, loss) for step, loss, _, _ in rows]
        assert stages[folder[3:]].info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(parents[0].info.run_id)} >= {"recipe.yaml", "journal.jsonl"}


def _steps(run_dir: Path) -> int:
    path = run_dir / "stages" / STAGES[0] / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _in_the_middle(run_dir: Path) -> bool:
    return _steps(run_dir) >= 7


def _writing_a_checkpoint(run_dir: Path) -> bool:
    folder = run_dir / "stages" / STAGES[0] / "checkpoints"
    if _steps(run_dir) < 5:
        return False
    return any(entry.name.startswith(".") and entry.is_dir() for entry in os.scandir(folder))


def _between_stages(run_dir: Path) -> bool:
    return any(event["event"] == "stage_completed" for event in events(run_dir))


def assert_equal_runs(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference), "every step once, with the same loss, tokens and samples"
    for stage in STAGES:
        assert final_bytes(run_dir, stage) == final_bytes(reference, stage), f"{stage}: the final weights are equal bit for bit"


@pytest.mark.parametrize(
    ("due", "engine"),
    [
        (_in_the_middle, "inline"),
        pytest.param(_in_the_middle, "ray", marks=pytest.mark.slow),
        pytest.param(_writing_a_checkpoint, "ray", marks=pytest.mark.slow),
        pytest.param(_between_stages, "ray", marks=pytest.mark.slow),
    ],
)
def test_kill_9_of_the_process_group(due: Callable[[Path], bool], engine: str, reference: Path, overrides: list[str], tmp_path: Path):
    """Killed in the middle, then the same command: equal to the uninterrupted run, whichever engine streamed the data."""
    engines = [f"stages.{stage[3:]}.data_loading.engine={engine}" for stage in STAGES]
    status = kill_when(tmp_path, overrides, lambda: due(tmp_path), *LONGER, *engines)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "stages" / STAGES[3] / "final").exists()
    ended = run_to_end(tmp_path, overrides, *LONGER, *engines)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert_equal_runs(tmp_path, reference)


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_with_143(reference: Path, overrides: list[str], tmp_path: Path):
    status = kill_when(tmp_path, overrides, lambda: _in_the_middle(tmp_path), *LONGER, number=signal.SIGTERM)
    assert status == 143
    stopped_at = _steps(tmp_path)
    assert (tmp_path / "stages" / STAGES[0] / "checkpoints" / f"step-{stopped_at:06d}").is_dir(), "no step was thrown away"
    ended = run_to_end(tmp_path, overrides, *LONGER)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert_equal_runs(tmp_path, reference)


@pytest.mark.slow
def test_workers_that_are_no_forks_train_the_same_bits(reference: Path, overrides: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TERRACE_FORK_WORKERS", "0")
    ended = run_to_end(tmp_path, overrides, *LONGER)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert_equal_runs(tmp_path, reference)


def test_two_controllers_are_refused(overrides: list[str], tmp_path: Path):
    from terrace.curriculum.journal import Journal

    with Journal(tmp_path):
        ended = subprocess.run(command(tmp_path, overrides), env=environment(), capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert f"process {os.getpid()}" in ended.stderr.splitlines()[0]
