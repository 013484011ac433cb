"""What a person and MLflow see of a run: rows followed through cuts, plain lines, every step once in the store."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report_run import made_recipe
from stored_run import BUCKET, Machines

from terrace.curriculum.state import RunState, StageState
from terrace.curriculum.watch import Watch
from terrace.storage.conditional import list_objects
from terrace.storage.run_layout import stage_directory
from terrace.track.follow import MetricsFollower, last_row
from terrace.track.mlflow_store import Store
from terrace.track.points import curriculum_points, flatten, metric_name, stage_points
from terrace.track.progress import Display, duration
from terrace.track.series import RunSpec, Series
from terrace.track.tracking import Tracking, open_tracking


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "tokens_per_second": 1234.5, "learning_rate": {"vision": 1e-4, "projector": 1e-3},
            "step_seconds": 0.5, "data_wait_seconds": 0.1, "time": 1000.0 + step, **more}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]], mode: str = "a") -> None:
    with open(path, mode) as file:
        file.writelines(json.dumps(item) + "\n" for item in rows)


def test_follower_yields_whole_rows_and_survives_a_cut(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert list(follower.rows()) == []
    assert last_row(path) is None
    write(path, [row(1), row(2)])
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert [item["step"] for item in follower.rows()] == [1, 2]
    assert list(follower.rows()) == []
    assert last_row(path)["step"] == 2
    fresh = tmp_path / "new"
    write(fresh, [row(1)])
    fresh.replace(path)  # a resume keeps the steps up to its checkpoint
    assert [item["step"] for item in follower.rows()] == [1]
    write(path, [row(2)])
    assert [item["step"] for item in follower.rows()] == [2]


def test_plain_lines_without_a_terminal():
    now = [0.0]
    output = io.StringIO()
    with Display(output, clock=lambda: now[0]) as display:
        display.stage(2, 4, "alignment", 100)
        for step in range(1, 101):
            now[0] += 0.1
            display.step(row(step))
        display.message("[bold] is not markup here")
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("stage 2/4 alignment  step 1/100  loss 1.0000")
    assert lines[-2].startswith("stage 2/4 alignment  step 100/100  loss 0.0100")
    assert lines[-1] == "[bold] is not markup here"
    assert 3 <= len(lines) <= 6, "a line every few seconds, not every step"
    assert "left" in lines[1]


def test_a_terminal_gets_a_bar():
    output = io.StringIO()
    with Display(output, terminal=True) as display:
        display.activity("ingest captions", 3, 10)
        display.stage(1, 4, "warmup", 10)
        display.step(row(4))
        display.step(row(5, loss=None))
    assert "1/4 warmup" in output.getvalue()
    assert "loss not finite" in output.getvalue()


def test_an_rl_stage_shows_the_reward_of_every_task():
    output = io.StringIO()
    with Display(output) as display:
        display.stage(5, 5, "morl", 10)
        display.step(row(10, tasks={"grounding": {"reward": 0.5}, "counting": {"reward": 0.25}}))
    assert output.getvalue().startswith("stage 5/5 morl  step 10/10  reward counting 0.250, grounding 0.500  1,23")


def test_a_resumed_stage_shows_where_it_goes_on_and_not_what_was_shown_before(tmp_path: Path):
    """The rows of the attempt before are there already: neither is its first step printed again, nor are its steps this one's speed."""
    recipe = made_recipe()
    output, now = io.StringIO(), [0.0]
    state = RunState([StageState(stage.name, at) for at, stage in enumerate(recipe.stages)])
    file = stage_directory(tmp_path, 0, recipe.stages[0].name) / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    write(file, [row(step) for step in range(1, 201)])
    watch = Watch(recipe, tmp_path, state, Display(output, clock=lambda: now[0]), pytest.fail)
    watch.begin_stage(state.stages[0])
    for step in (200, 210):
        write(file, [row(more) for more in range(201, step + 1)])
        watch.poll()
        now[0] += 20.0
    shown = [line.partition("step ")[2].partition("  loss")[0] for line in output.getvalue().splitlines()]
    assert shown == ["200/400", "210/400"]
    assert output.getvalue().splitlines()[1].endswith("6m20s left"), "190 steps at the 2 s that one took"


def test_duration():
    assert [duration(seconds) for seconds in (-3, 0.4, 59, 75, 3700, 90000)] == ["0s", "0s", "59s", "1m15s", "1h01m", "1d01h"]


def test_points_of_rows_and_evaluations():
    assert flatten({"a": {"b": 1, "c": None}, "d": [1, 2], "e": [{"f": 3}]}) == [("a.b", 1), ("d", [1, 2]), ("e.0.f", 3)]
    found = dict(stage_points(row(4, loss=None, tasks={"a?b": {"reward": 0.5}}, evaluation={"caption": 2.0, "reward/counting": 1})))
    assert math.isnan(found.pop("loss")), "the step's place must be in the store"
    assert {
        "learning_rate/vision": 1e-4, "tasks/a_b/reward": 0.5, "eval/caption/loss": 2.0, "eval/reward/counting": 1.0,
        "data_wait_share": 0.2,
    }.items() <= found.items()  # fmt: skip
    assert dict(curriculum_points(row(4, tasks={"counting": {"reward": 0.5}}), 2, "/rerun-1")) == {
        "stage/rerun-1": 2.0, "loss/rerun-1": 0.25, "tokens_per_second/rerun-1": 1234.5, "reward/counting/rerun-1": 0.5,
    }  # fmt: skip
    names = {"a//b/../c": "a/b/c", "größe|x": "gr__e_x", "": "unnamed", "x" * 300: "x" * 250, "a b.c:d-e": "a b.c:d-e"}
    for name, taken in names.items():
        assert metric_name(name) == taken


# ---------------------------------------------------------------- a store on this disk


def store_of(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


def steps_of(client: Any, run: str, key: str) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run, key))


def spec(name: str, ids: dict[str, str], **more: Any) -> RunSpec:
    return RunSpec(f"key-{name}", name, {"budget": {"steps": 6}}, {}, ids.get(name), done=lambda run: ids.update({name: run}), **more)


def test_a_resume_adds_only_the_steps_that_are_not_there(tmp_path: Path):
    """Two processes, the second with steps the first had logged already: every step once, parent and stage continued."""
    warnings: list[str] = []
    ids: dict[str, str] = {}
    path = tmp_path / "metrics.jsonl"

    def session(status: str) -> None:
        tracking = open_tracking(tmp_path, None, "terrace", warnings.append)
        tracking.open_run(spec("run", ids))
        tracking.open_run(spec("stage", ids, parent="key-run"))
        for series, key in ((Series(path), "key-stage"), (Series(path, 1, 3, 100), "key-run")):
            tracking.log_rows(key, series)
        tracking.log_evaluation("key-stage", [("eval/caption/loss", 1.5)], 0, 1000.0)
        tracking.log_model("key-stage", "mine/01-sft", "here", 6)
        tracking.end_run("key-stage", status, {"terrace.final": "here"})
        assert tracking.flush(60)
        tracking.close()

    write(path, [row(step) for step in range(1, 5)])
    session("SCHEDULED")
    first = dict(ids)
    path.unlink()  # the resume cut it to the checkpoint and took other times
    write(path, [row(step, time=5000.0 + step, tokens_per_second=9.0) for step in range(1, 7)])
    session("FINISHED")
    assert warnings == []
    assert ids == first
    client = store_of(tmp_path)
    for key in ("loss", "learning_rate/vision", "tokens_per_second", "data_wait_share"):
        assert steps_of(client, ids["stage"], key) == [1, 2, 3, 4, 5, 6]
    assert steps_of(client, ids["run"], "loss") == [101, 102, 103, 104, 105, 106]
    assert steps_of(client, ids["stage"], "eval/caption/loss") == [0]
    stage = client.get_run(ids["stage"])
    assert stage.data.tags["mlflow.parentRunId"] == ids["run"]
    assert stage.data.tags["terrace.final"] == "here"
    assert stage.data.params["budget.steps"] == "6"
    assert stage.info.status == "FINISHED"
    experiment = client.get_experiment_by_name("terrace")
    model, = client.search_logged_models([experiment.experiment_id])
    assert (model.name, model.status, model.tags["terrace.place"]) == ("mine_01-sft", "READY", "here")
    assert [(output.model_id, output.step) for output in stage.outputs.model_outputs] == [(model.model_id, 6)]


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run whose id was lost is found by its key, one that was deleted is made anew and full; a failing artifact ends nothing."""
    monkeypatch.setattr("terrace.track.tracking.TRY_SECONDS", 0.01)
    warnings: list[str] = []
    ids: dict[str, str] = {}
    path = tmp_path / "metrics.jsonl"
    write(path, [row(1), row(2)])

    def session(forget: bool) -> str:
        store = Store(f"sqlite:///{tmp_path}/mlflow.db", "odd", None, warnings.append)
        store._connected()
        if store._client.get_experiment_by_name("odd") is None:
            store._client.create_experiment("odd", artifact_location="nosuch://place")
        tracking = Tracking(store, warnings.append)
        tracking.open_run(spec("run", {} if forget else ids))
        tracking.log_artifacts("key-run", [path])
        tracking.log_rows("key-run", Series(path))
        tracking.flush(60)
        deleted = store._ids["key-run"]
        if forget:
            store._client.delete_run(deleted)
            write(path, [row(3)])
            tracking.log_rows("key-run", Series(path))
        tracking.end_run("key-run", "FINISHED")
        assert tracking.flush(60)
        tracking.close()
        assert tracking.failed == 1
        assert store._client.get_run(store._ids["key-run"]).info.status == "FINISHED"
        assert (deleted == store._ids["key-run"]) is not forget
        return store._ids["key-run"]

    first = session(forget=False)
    assert session(forget=False) == first
    second = session(forget=True)
    assert steps_of(store_of(tmp_path), second, "loss") == [1, 2, 3]
    assert len(warnings) == 3
    assert all("artifact metrics.jsonl was left out" in line and "\n" not in line for line in warnings)


def test_artifacts_of_an_sqlite_file_lie_beside_it_and_not_where_the_command_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "called").mkdir()
    (tmp_path / "recipe.yaml").write_text("name: x")
    monkeypatch.chdir(tmp_path / "called")
    for uri, place in ((None, "run"), (f"sqlite:///{tmp_path}/far/x.db", "far"), ("sqlite:///near.db", "called")):
        (tmp_path / place).mkdir(exist_ok=True)
        tracking = open_tracking(tmp_path / "run", uri, "terrace", pytest.fail)
        tracking.open_run(spec("run", {}))
        tracking.log_artifacts("key-run", [tmp_path / "recipe.yaml"])
        assert tracking.flush(60)
        tracking.close()
        assert [file.name for file in (tmp_path / place / "mlartifacts").rglob("*.yaml")] == ["recipe.yaml"], uri
    assert not (tmp_path / "called" / "mlruns").exists()


def test_artifacts_go_to_an_artifact_store_on_s3(machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The usual large set-up of MLflow: its artifact root is a bucket, which clients write to themselves."""
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", machines.server.url)
    warnings: list[str] = []
    (tmp_path / "recipe.yaml").write_text("name: x")
    store = Store(f"sqlite:///{tmp_path}/mlflow.db", "stored", None, warnings.append)
    store._connected().create_experiment("stored", artifact_location=f"s3://{BUCKET}/artifacts")
    tracking = Tracking(store, warnings.append)
    tracking.open_run(spec("run", {}))
    tracking.log_artifacts("key-run", [tmp_path / "recipe.yaml", tmp_path / "none.jsonl"])
    tracking.end_run("key-run", "FINISHED")
    assert tracking.flush(60)
    tracking.close()
    assert warnings == []
    assert [entry.name.rpartition("/")[2] for entry in list_objects(f"s3://{BUCKET}/artifacts")] == ["recipe.yaml"]


def test_metrics_that_the_server_refuses_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("terrace.track.series.stage_points", lambda row: [*stage_points(row), ("no|name", 1.0)])
    warnings: list[str] = []
    ids: dict[str, str] = {}
    path = tmp_path / "metrics.jsonl"
    write(path, [row(step) for step in range(1, 4)])
    tracking = open_tracking(tmp_path, None, "terrace", warnings.append)
    tracking.open_run(spec("run", ids))
    tracking.log_rows("key-run", Series(path))
    assert tracking.flush(60)
    tracking.close()
    assert steps_of(store_of(tmp_path), ids["run"], "grad") == []
    assert steps_of(store_of(tmp_path), ids["run"], "loss") == [1, 2, 3]
    [line] = warnings
    assert "does not take no|name" in line


def test_a_dead_tracking_server_is_named_once_and_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    tracking = open_tracking(tmp_path, "http://127.0.0.1:9", "terrace", warnings.append)
    tracking.open_run(spec("run", {}))
    assert not tracking.flush(60)
    for _ in range(1000):
        tracking.log_rows("key-run", Series(tmp_path / "metrics.jsonl"))
    assert len(tracking._each[0]._works) < 5, "an outage of days costs no memory"
    began = time.monotonic()
    tracking.close()
    assert time.monotonic() - began < 10
    assert len(warnings) == 2
    assert "http://127.0.0.1:9 is not reached" in warnings[0]
    assert "`terrace track RUN --uri URI` sends the rest" in warnings[1]
    assert "\n" not in "".join(warnings)
