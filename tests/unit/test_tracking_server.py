"""Tracking on a real `mlflow server`: away in the middle, a finished run sent afterwards, another server; every point once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mlflow_server import MlflowServer, mlflow_server, runs_by_name, steps
from report_run import write_run
from waiting import eventually

from terrace import cli
from terrace.track import tracking as tracking_module
from terrace.track.series import RunSpec, Series
from terrace.track.tracking import open_tracking


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


def test_a_finished_run_is_sent_whole_and_once(
    server: MlflowServer, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    run_dir = write_run(tmp_path / "made", steps=40)
    source = "captions"
    prepared = json.loads((run_dir / "data/prepared.json").read_text())
    prepared["sources"] = {source: {"folder": "captions/1/index-2", "holdout_samples": 4, "holdout_share": 0.0, "max_samples": None}}
    (run_dir / "data/prepared.json").write_text(json.dumps(prepared))
    for _ in range(2):
        assert cli.main(["track", str(run_dir), "--uri", server.uri, "--experiment", "sent"]) == 0
    assert cli.main(["track", str(run_dir), "--uri", "http://127.0.0.1:9"]) == 1
    out, err = capfd.readouterr()
    assert "terrace: the tracking server http://127.0.0.1:9 is not reached: MlflowException" in err
    assert out == f"{run_dir} is at {server.uri}\n" * 2
    assert "left out" not in err
    found = server.client()
    runs = runs_by_name(found, "sent")
    assert len(runs) == 4
    parent = runs.pop("made")
    stages = [runs[name] for name in sorted(runs)]
    assert [len(steps(found, stage.info.run_id, "loss")) for stage in stages] == [40, 40, 40]
    assert [stage.info.status for stage in stages[:2]] == ["FINISHED", "FINISHED"]
    assert {stage.data.tags["mlflow.parentRunId"] for stage in stages} == {parent.info.run_id}
    assert not [name for stage in stages for name in stage.data.metrics if name.startswith("result")]
    assert steps(found, parent.info.run_id, "stage") == list(range(1, 121)), "the curriculum's steps are counted on"
    for stage, after in ((stages[0], 2.1), (stages[1], 1.05)):
        line = found.get_metric_history(stage.info.run_id, "eval/caption/loss")
        assert [line[0].step, line[-1].step, line[-1].value] == [0, 40, after]
        assert len({point.step for point in line}) == len(line), "each evaluation once"
    line = [point.step for point in found.get_metric_history(parent.info.run_id, "eval/caption/loss")]
    assert {0, 40, 80} <= set(line)
    assert len(line) == len(set(line))
    worked = max(json.loads(line)["time"] for line in (run_dir / "journal.jsonl").read_text().split("\n")[:-1])
    assert parent.info.status == "SCHEDULED"
    assert parent.info.end_time == int(worked * 1000), "the clock of a run that rests stands still"
    assert len(parent.data.tags["mlflow.user"]) > 0
    assert parent.data.tags["mlflow.source.name"] == "terrace run made"
    models = {model.source_run_id: model for model in found.search_logged_models([parent.info.experiment_id])}
    assert set(models) == {stage.info.run_id for stage in stages[:2]}, "one per complete stage, by reference"
    assert models[stages[0].info.run_id].tags["terrace.place"] == stages[0].data.tags["terrace.final"]
    assert [item.dataset.name for item in parent.inputs.dataset_inputs] == [source]
    assert {file.path for file in found.list_artifacts(parent.info.run_id)} == {"recipe.yaml", "journal.jsonl"}


def test_steps_of_an_outage_arrive_when_the_server_is_back(server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking_module, "FIRST_WAIT_SECONDS", 0.3)
    monkeypatch.setattr(tracking_module, "LARGEST_WAIT_SECONDS", 0.3)
    path, said, ids = tmp_path / "metrics.jsonl", [], []
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    tracking = open_tracking(tmp_path, server.uri, "outage", said.append, system_metrics=True)
    tracking.open_run(RunSpec("key", "run", {}, {}, done=ids.append))

    def rows(first: int, last: int) -> None:
        with open(path, "a") as file:
            file.writelines(json.dumps({"step": step, "loss": 1 / step, "time": 1000.0 + step}) + "\n" for step in range(first, last + 1))
        tracking.log_rows("key", Series(path))

    rows(1, 5)
    assert tracking.flush(60)
    assert eventually(lambda: len(steps(server.client(), ids[0], "system/cpu_utilization_percentage")) > 1, 60)
    server.kill()
    rows(6, 10)
    assert eventually(lambda: tracking.away, 60)
    for step in range(11, 31):
        rows(step, step)
    tracking.open_run(RunSpec("late", "a stage that began and ended meanwhile", {}, {}, parent="key", done=ids.append))
    tracking.end_run("late", "FINISHED")
    tracking.end_run("key", "FINISHED")
    time.sleep(1)
    server.start()
    assert eventually(lambda: tracking.flush(60), 120)
    tracking.close()
    found = server.client()
    assert steps(found, ids[0], "loss") == list(range(1, 31))
    assert {run.info.status for run in runs_by_name(found, "outage").values()} == {"FINISHED"}
    assert len(runs_by_name(found, "outage")) == 2
    machine = steps(found, ids[0], "system/cpu_utilization_percentage")
    assert machine == list(range(len(machine)))
    assert not [name for name in found.get_run(ids[1]).data.metrics if name.startswith("system/")], "of the curriculum's run alone"
    assert [line.partition(f"{server.uri} is ")[2][:10] for line in said] == ["not reache", "back"]


@pytest.mark.slow
def test_mlflows_pages_in_a_browser(server: MlflowServer, tmp_path: Path):
    """Chromium opens what a person opens: a chart with a line for each of the curriculum's figures, and the models of its stages."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    run_dir = write_run(tmp_path / "made", steps=40)
    assert cli.main(["track", str(run_dir), "--uri", server.uri, "--experiment", "looked-at"]) == 0
    found = server.client()
    run = runs_by_name(found, "looked-at")["made"]
    experiment = f"{server.uri}/#/experiments/{run.info.experiment_id}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=150000", "--window-size=1600,2400"]  # fmt: skip

    def browse(what: str, address: str) -> str:
        command = [browser, *flags, what, address]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "HOME": str(tmp_path)}).stdout

    charts = browse("--dump-dom", f"{experiment}/runs/{run.info.run_id}/model-metrics?workflowType=machine_learning")
    assert charts.count("js-plotly-plot") == len(run.data.metrics) == 7
    for name in ("loss", "stage", "tokens_per_second", "eval/caption/loss", "reward/counting"):
        assert name in charts
    assert "Model registry" in charts
    assert "Judges" not in charts, "the pages of training"
    models = browse("--dump-dom", f"{experiment}/models?workflowType=machine_learning")
    assert "made-01-projector-warmup" in models
    assert "made-02-alignment" in models
    if folder := os.environ.get("TERRACE_SHOTS"):  # for a person who wants to look
        browse(f"--screenshot={folder}/mlflow-models.png", f"{experiment}/models?workflowType=machine_learning")
        browse(f"--screenshot={folder}/mlflow-run.png", f"{experiment}/runs/{run.info.run_id}?workflowType=machine_learning")
