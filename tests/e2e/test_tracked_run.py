"""A whole run beside a real `mlflow server` that comes after the run began, dies in its middle, and is sent the rest afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from e2e_runs import REPOSITORY, command, environment, losses
from mlflow_server import mlflow_server, runs_by_name, steps
from waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_server_that_comes_late_and_dies_early_has_every_step_in_the_end(overrides: list[str], tmp_path: Path):
    run_dir = tmp_path / "run"
    with mlflow_server(tmp_path / "server", started=False) as server:
        words = command(run_dir, overrides, f"tracking.uri={server.uri}", "--launcher", "process")
        more = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
        run = subprocess.Popen(words, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)
        try:
            assert eventually(lambda: (run_dir / "stages/01-projector-warmup/metrics.jsonl").exists() or run.poll() is not None, 600)
            server.start()
            found = server.client()

            def logged() -> bool:
                experiment = found.get_experiment_by_name("terrace")
                return experiment is not None and any("loss" in run.data.metrics for run in found.search_runs([experiment.experiment_id]))

            assert eventually(lambda: logged() or run.poll() is not None, 300)
            midway = run.poll() is None
            server.kill()
            said, _ = run.communicate(timeout=900)
        finally:
            run.kill()
        assert run.returncode == 0, said
        assert midway, "the server came back while the run was still going"
        assert said.count("is not reached") == 2, said
        assert said.count(f"tracking at {server.uri} is back") == 1
        assert "`terrace track RUN --uri URI` sends the rest" in said
        sent = [sys.executable, "-m", "terrace.cli", "track", str(run_dir)]
        away = subprocess.run(sent, env=environment(**more), capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
        assert away.returncode == 1
        assert away.stderr.count("\n") == 1, away.stderr
        server.start()
        done = subprocess.run(sent, env=environment(), capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        runs = runs_by_name(found, "terrace")
        written = losses(run_dir)
        assert set(runs) == {"tiny", *written}
        for stage, rows in written.items():
            assert steps(found, runs[stage].info.run_id, "loss") == [row[0] for row in rows]
            assert runs[stage].data.metrics["loss"] == rows[-1][1]
        whole = sum(len(rows) for rows in written.values())
        assert steps(found, runs["tiny"].info.run_id, "loss") == list(range(1, whole + 1))
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
