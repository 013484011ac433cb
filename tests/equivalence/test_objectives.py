"""A new objective is one file and one entry: it gets resuming, checkpoints, the watchdog, every strategy, metrics and the report."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import tiny_recipe
from processes import run_ranks
from ranks import losses, memory_feed, stage_dir, train, train_stages
from safetensors.torch import load_file
from toy_objective import train_toys

from terrace.curriculum.report_command import collect_run
from terrace.errors import Preempted
from terrace.recipe.loading import dump_recipe
from terrace.recipe.schema import Recipe
from terrace.storage.durable import json_bytes
from terrace.track.report.page import write_page
from terrace.track.series import RunSpec, Series
from terrace.track.tracking import open_tracking
from terrace.train.watchdog import Watchdog
from terrace.worker.context import WorkerContext


def toy_recipe(**stage: Any) -> Recipe:
    return tiny_recipe(objective="toy", budget={"steps": 4}, checkpoint={"every_steps": 2}, **stage)


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (stage_dir(run, 0) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k} for line in lines]


def run_toy(folder: Path, recipe: Recipe, **options: Any) -> list[Any]:
    return train_stages(0, 1, recipe.model_dump(mode="json"), str(folder), **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    run_toy(folder, toy_recipe())
    return folder


def test_its_checkpoints_hold_its_own_state_and_a_resumed_stage_goes_on_from_it(straight, tmp_path):
    with pytest.raises(Preempted):
        run_toy(tmp_path, toy_recipe(), stop_after=3)
    stopped = stage_dir(tmp_path, 0) / "checkpoints" / "step-000003"
    assert "objective-00000.safetensors" in json.loads((stopped / "manifest.json").read_text())["files"]
    kept = load_file(stopped / "objective-00000.safetensors")["running"]
    assert kept[1] == 3
    assert float(kept[0]) == pytest.approx(np.mean(losses(straight)[:3]))
    run_toy(tmp_path, toy_recipe())
    assert rows_of(tmp_path) == rows_of(straight)
    assert rows_of(straight)[-1]["running_loss"] == pytest.approx(np.mean(losses(straight)))
    evaluation = json.loads((stage_dir(straight, 0) / "result.json").read_text())["evaluation"]
    assert evaluation["after"]["caption"] < evaluation["before"]["caption"]
    plain = tmp_path / "plain"
    train_stages(0, 1, tiny_recipe(budget={"steps": 1}).model_dump(mode="json"), str(plain))
    assert not list(plain.rglob("objective-*")), "an objective without state leaves none"
    assert losses(plain)[0] != losses(straight)[0]


def test_every_strategy_gives_the_losses_of_one_process(straight, tmp_path):
    strategies = ["ddp", "fsdp", "zero2"]
    recipes = {name: toy_recipe(parallel={"strategy": name}).model_dump(mode="json") for name in strategies}
    run_ranks(2, train_toys, recipes, str(tmp_path), timeout=400)
    for name in strategies:
        np.testing.assert_allclose(losses(tmp_path / name), losses(straight), rtol=1e-5, err_msg=name)
        running = load_file(stage_dir(tmp_path / name, 0) / "checkpoints" / "step-000004" / "objective-00000.safetensors")
        assert running["running"][1] == 4, name


def test_the_watchdog_says_where_it_hangs(tmp_path, monkeypatch):
    ended: list[int] = []
    real = Watchdog.__init__
    monkeypatch.setattr(Watchdog, "__init__", lambda self, *arguments: real(self, *arguments, end=ended.append))
    context, recipe = WorkerContext(), toy_recipe(failure={"hang_timeout_seconds": 0.3})
    feed = memory_feed(recipe, 0, context)

    def stalling(start: int) -> Any:
        for taken in feed.stream(start):
            if taken.step == 2:
                time.sleep(1.5)
            yield taken

    train(recipe, 0, dataclasses.replace(feed, stream=stalling), tmp_path, None, context, attempt=1)
    assert ended == [1]
    message = json.loads((tmp_path / "hang" / "attempt-001" / "summary.json").read_text())["message"]
    assert "waiting for the data of step 3" in message


def test_the_report_and_mlflow_show_it(straight, tmp_path):
    run_dir = tmp_path / "run"
    stage = run_dir / "stages" / "01-one"
    stage.parent.mkdir(parents=True)
    stage.symlink_to(stage_dir(straight, 0), target_is_directory=True)
    (run_dir / "recipe.yaml").write_text(dump_recipe(toy_recipe(pixels={"min": 784, "max": 50176})))
    events = [
        {"event": "run_started", "stages": ["one"], "recipe_hash": "0"},
        {"event": "stage_attempt_started", "stage": "one", "attempt": 1},
        {"event": "stage_attempt_launched", "stage": "one", "attempt": 1},
        {"event": "stage_completed", "stage": "one", "attempt": 1, "result": {"steps": 4}},
    ]
    lines = [{"sequence": number, "time": 1.78e9 + number, "token": 1, **event} for number, event in enumerate(events, 1)]
    (run_dir / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = collect_run(run_dir)
    page = write_page([report], tmp_path / "report.html").read_text()
    assert "toy<small>" in page
    assert report.stages[0].stage.objective == "toy"

    warnings: list[str] = []
    ids: list[str] = []
    tracking = open_tracking(tmp_path, None, "terrace", warnings.append)
    tracking.open_run(RunSpec("stage", "stage", {}, {}, done=ids.append))
    tracking.log_rows("stage", Series(stage / "metrics.jsonl"))
    assert tracking.flush(60)
    tracking.close()
    from mlflow.tracking import MlflowClient

    points = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_metric_history(ids[0], "running_loss")
    assert [point.value for point in sorted(points, key=lambda point: point.step)] == [row["running_loss"] for row in rows_of(straight)]
    assert warnings == []


def test_examples_that_meet_must_be_equally_many_on_every_rank():
    from terrace.errors import TerraceError
    from terrace.objectives.interface import Objective, Opening, StageFeed, StepExamples
    from terrace.train.step import count_batch, filled_up

    class Meeting(Objective):
        coupled = True

        def weight(self, example: Any) -> float:
            return 1.0

        def empty(self) -> Any:
            return "empty"

    recipe = tiny_recipe()
    feed = StageFeed(None, 0, lambda start: iter(()), lambda step: {}, lambda state: None)
    objective = Meeting(Opening(recipe, recipe.stages[0], feed, WorkerContext(), Path()))
    counts = count_batch(objective, StepExamples(0, ["a", "b"]), [], False, WorkerContext())
    assert (counts.divisor, counts.samples, counts.packs_of_a_rank) == (2.0, 2, 2)
    assert filled_up(objective, ["a", "b"], counts) == ["a", "b"]
    with pytest.raises(TerraceError, match="multiple of the workers"):
        filled_up(objective, ["a"], counts)
    objective.coupled = False
    assert filled_up(objective, ["a"], counts) == ["a", "empty"]


def test_an_objective_that_no_entry_names_is_refused():
    with pytest.raises(ValueError, match="'lm', 'mlm', 'grpo', 'reward_model'"):
        tiny_recipe(objective="lmm")
    assert json.loads(json_bytes(toy_recipe().model_dump(mode="json")))["stages"][0]["objective"] == "toy"
