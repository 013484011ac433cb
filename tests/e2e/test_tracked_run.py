"""A whole run beside a real `mlflow server` that comes after the run began, dies in its middle, and is sent the rest afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_runs import REPOSITORY, command, environment, losses
from mlflow_server import mlflow_server, runs_by_name, steps
from waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


LONG = ["stages.alignment.budget.steps=20000", "stages.alignment.checkpoint.every_steps=1000"]  # longer than anything below takes


def test_a_server_that_comes_late_and_dies_early_has_every_step_in_the_end(overrides: list[str], tmp_path: Path):
    run_dir, short = tmp_path / "run", {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    alignment = run_dir / "stages" / "02-alignment" / "metrics.jsonl"
    with mlflow_server(tmp_path / "server", started=False) as server, open(tmp_path / "said", "w") as log:
        words = command(run_dir, [*overrides, *LONG], f"tracking.uri={server.uri}", "--launcher", "process")
        run = subprocess.Popen(words, env=environment(**short), stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY)
        try:
            assert eventually(lambda: alignment.exists() or run.poll() is not None, 600), "a stage begins and ends without a server"
            server.start()
            found = server.client()

            def logged() -> bool:
                experiment = found.get_experiment_by_name("terrace")
                return experiment is not None and any("loss" in run.data.metrics for run in found.search_runs([experiment.experiment_id]))

            assert eventually(lambda: logged() or run.poll() is not None, 300)
            server.kill()
            assert eventually(lambda: (tmp_path / "said").read_text().count("is not reached") == 2 or run.poll() is not None, 300)
            run.send_signal(signal.SIGTERM)
            status = run.wait(300)
        finally:
            run.kill()
        said = (tmp_path / "said").read_text()
        assert status == 143, said
        assert said.count("is not reached") == 2, said
        assert said.count(f"tracking at {server.uri} is back") == 1
        assert "`terrace track RUN --uri URI` sends the rest" in said
        sent = [sys.executable, "-m", "terrace.cli", "track", str(run_dir)]
        away = subprocess.run(sent, env=environment(**short), capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
        assert away.returncode == 1
        assert away.stderr.count("\n") == 1, away.stderr
        server.start()
        done = subprocess.run(sent, env=environment(), capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        runs, written = runs_by_name(found, "terrace"), losses(run_dir)
        assert set(runs) == {"tiny", *written}
        assert len(written["01-projector-warmup"]) == 4
        for stage, rows in written.items():
            assert steps(found, runs[stage].info.run_id, "loss") == [row[0] for row in rows]
            assert runs[stage].data.metrics["loss"] == rows[-1][1]
        whole = sum(len(rows) for rows in written.values())
        assert steps(found, runs["tiny"].info.run_id, "loss") == list(range(1, whole + 1))
        ends = {name: run.info.status for name, run in runs.items()}
        assert ends == {"tiny": "SCHEDULED", "01-projector-warmup": "FINISHED", "02-alignment": "SCHEDULED"}
