"""What a person and MLflow see of a run: rows followed through cuts, plain lines, every step once in the store."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from terrace.track.follow import MetricsFollower, last_row
from terrace.track.mlflow_store import flatten, open_tracking
from terrace.track.progress import Display, duration


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


def test_duration():
    assert [duration(seconds) for seconds in (-3, 0.4, 59, 75, 3700, 90000)] == ["0s", "0s", "59s", "1m15s", "1h01m", "1d01h"]


def test_flatten():
    assert flatten({"a": {"b": 1, "c": None}, "d": [1, 2], "e": [{"f": 3}]}) == [("a.b", 1), ("d", [1, 2]), ("e.0.f", 3)]


def test_a_resume_adds_only_the_steps_that_are_not_there(tmp_path: Path):
    """Two processes, the second with steps the first had logged already: every step once, parent and stage continued."""
    warnings: list[str] = []
    ids: dict[str, str] = {}

    def session(rows: list[dict[str, Any]], status: str) -> None:
        tracking = open_tracking(tmp_path, None, "terrace", warnings.append)
        tracking.start_run("run", ids.get("run"), None, {"model": {"seed": 0}}, {}, lambda run: ids.update(run=run))
        assert tracking.flush(60)
        tracking.start_run("stage", ids.get("stage"), ids["run"], {"budget": {"steps": 6}}, {}, lambda run: ids.update(stage=run))
        assert tracking.flush(60)
        tracking.log_steps(ids["stage"], rows)
        tracking.log_result(ids["stage"], {"evaluation": {"after": {"caption": 1.5}}}, 6)
        tracking.end_run(ids["stage"], status)
        tracking.close()

    session([row(step) for step in range(1, 5)], "SCHEDULED")
    first = dict(ids)
    session([row(step, time=5000.0 + step, tokens_per_second=9.0) for step in range(3, 7)], "FINISHED")
    assert warnings == []
    assert ids == first

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for key in ("loss", "learning_rate/vision", "tokens_per_second", "data_wait_share"):
        assert sorted(point.step for point in client.get_metric_history(ids["stage"], key)) == [1, 2, 3, 4, 5, 6]
    stage = client.get_run(ids["stage"])
    assert stage.data.tags["mlflow.parentRunId"] == ids["run"]
    assert stage.data.params["budget.steps"] == "6"
    assert stage.data.metrics["result/evaluation/after/caption"] == 1.5
    assert stage.info.status == "FINISHED"


def test_a_run_whose_id_was_lost_is_found_by_its_key(tmp_path: Path):
    warnings: list[str] = []
    ids: list[str] = []
    for _ in range(2):
        tracking = open_tracking(tmp_path, None, "terrace", warnings.append)
        tracking.start_run("run", None, None, {}, {"terrace.key": "abc"}, ids.append)
        assert tracking.flush(60)
        tracking.close()
    assert ids[0] == ids[1]
    assert warnings == []


def test_a_dead_tracking_server_is_named_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    warnings: list[str] = []
    tracking = open_tracking(tmp_path, "http://127.0.0.1:9", "terrace", warnings.append)
    tracking.start_run("run", None, None, {}, {}, lambda run: None)
    assert not tracking.flush(60)
    tracking.log_steps("none", [row(1)])
    tracking.close()
    assert len(warnings) == 1
    assert "http://127.0.0.1:9" in warnings[0]
    assert "\n" not in warnings[0]
