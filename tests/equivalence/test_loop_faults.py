"""What every objective owes to the one loop: fp16, rewinding, damage, the divisor, steps that train nothing, kills at the end."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import flip
from packs import tiny_recipe
from ranks import Step, losses, memory_feed, stage_dir, train, train_stages
from rl_stage import figures_of, pair_recipe, rl_recipe, run, write_pairs, write_prompts

from terrace.curriculum import attempt_worker
from terrace.data.prepare import load_prepared, prepare_data
from terrace.errors import DamagedData, Preempted
from terrace.models.weights import Directory
from terrace.objectives.interface import Objective
from terrace.objectives.lm import LanguageModelling, empty_pack
from terrace.objectives.reward_model import RewardModel
from terrace.recipe.schema import Recipe
from terrace.rl.objective import Grpo
from terrace.train.loss_scale import LossScale
from terrace.train.progress import NothingLearned
from terrace.train.step import NonFinite
from terrace.worker.context import WorkerContext


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder)
    prepare_data(pair_recipe(folder), folder, use_ray=False)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    write_prompts(folder)
    prepare_data(rl_recipe(folder), folder, use_ray=False)
    return folder


def state_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())


# ---------------------------------------------------------------- not a number


def test_a_reward_model_in_fp16_lowers_its_scale_and_trains(pairs, monkeypatch):
    monkeypatch.setattr(LossScale.__init__, "__defaults__", (2.0**24, 1000, 0, 0))
    result = run(pair_recipe(pairs, 8, precision="fp16"), pairs, "fp16")
    scale = state_of(pairs / "fp16", 8)["loss_scale"]
    assert 0 < result.skipped_steps < 8
    assert scale["overflows"] == result.skipped_steps
    assert scale["value"] == 2.0**24 / 2**result.skipped_steps
    assert [line.get("skipped", False) for line in figures_of(pairs, "fp16")].count(True) == result.skipped_steps


@pytest.mark.parametrize("objective", [RewardModel, Grpo])
def test_after_a_rewind_the_step_is_left_out(pairs, prompts, monkeypatch, objective):
    folder = pairs if objective is RewardModel else prompts
    options: dict[str, Any] = {"failure": {"on_nonfinite": "rewind"}, "evaluate": {"max_samples_per_kind": 1}}
    recipe = pair_recipe(folder, 3, **options) if objective is RewardModel else rl_recipe(folder, 3, **options)
    before, loss, steps = objective.before, objective.loss, []

    def counted(self: Any, examples: Any, scale: float) -> None:
        steps.append(scale)
        before(self, examples, scale)

    def poisoned(self: Any, model: Any, batch: Any) -> torch.Tensor:
        return loss(self, model, batch) * (float("nan") if len(steps) == 2 else 1.0)

    monkeypatch.setattr(objective, "before", counted)
    monkeypatch.setattr(objective, "loss", poisoned)
    with pytest.raises(NonFinite, match=r"step 2: .* Samples: rank 0: \S"):
        run(recipe, folder, "rewind")
    steps.extend([0.0] * 10)
    assert run(recipe, folder, "rewind").skipped_steps == 1
    assert [line["loss"] is None for line in figures_of(folder, "rewind")] == [False, True, False]
    assert json.loads((folder / "rewind" / "left_out_steps.json").read_text()) == [2]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", ["prompt", "preference"])
def test_damage_is_left_out_where_the_source_says_so(tmp_path, kind):
    (write_prompts if kind == "prompt" else write_pairs)(tmp_path)
    made = rl_recipe(tmp_path, 2) if kind == "prompt" else pair_recipe(tmp_path, 2, batch={"packs": 16})
    values = made.model_dump(mode="json")
    prepare_data(Recipe.model_validate(values), tmp_path, use_ray=False)
    prepared = load_prepared(tmp_path / "data")
    for name, index in prepared.indexes.items():
        for row in range(0, len(index), 2):
            flip(prepared, name, row)
    with pytest.raises(DamagedData):
        run(Recipe.model_validate(values), tmp_path, "stop")
    for source in values["data"]["sources"].values():
        source["on_damage"] = "skip"
    result = run(Recipe.model_validate(values), tmp_path, "skip")
    lines = figures_of(tmp_path, "skip")
    assert result.steps == 2
    assert sum(line.get("damaged_samples", 0) for line in lines) > 0
    if kind == "preference":
        assert all(line["samples"] + line.get("damaged_samples", 0) == 16 for line in lines)
        assert all(line["supervised_tokens"] == 2 * line["samples"] for line in lines)
    else:
        assert all(line["groups_drawn"] > 0 for line in lines)


def test_ranks_agree_on_the_groups_when_one_of_them_could_not_read_a_prompt(monkeypatch):
    from types import SimpleNamespace

    from terrace.rl import collect
    from terrace.rl.prompts import Drawn

    drawn = [Drawn(("s", row), 0) for row in range(5)]
    groups = [SimpleNamespace(drawn=one) for one in drawn]
    hands = [([groups[0], groups[4]], ["s/two"]), ([groups[1], groups[3]], [])]
    monkeypatch.setattr(collect, "gather_objects", lambda own, context: hands)
    found, damaged = collect.Collector._exchange(SimpleNamespace(context=None), [], drawn)
    assert [group.drawn for group in found] == [drawn[0], drawn[1], drawn[3], drawn[4]]
    assert damaged == ["s/two"]


# ---------------------------------------------------------------- the divisor


def test_only_responses_that_train_are_in_the_divisor(prompts, monkeypatch):
    seen: list[tuple[float, int]] = []
    before, add = Grpo.before, Grpo.seen

    def scaled(self: Any, examples: Any, scale: float) -> None:
        seen.append((scale, 0))
        before(self, examples, scale)

    def counted(self: Any, example: Any, batch: Any) -> None:
        seen[-1] = (seen[-1][0], seen[-1][1] + len(batch.tokens))
        add(self, example, batch)

    monkeypatch.setattr(Grpo, "before", scaled)
    monkeypatch.setattr(Grpo, "seen", counted)
    rewards = {task: [{"name": "rl_rules:sometimes_failing"}] for task in ("digits", "capitals")}
    run(rl_recipe(prompts, 2, {"max_reward_failure_rate": 1.0}, rewards=rewards), prompts, "divisor")
    lines = figures_of(prompts, "divisor")
    assert any(figures["reward_failures"] > 0 for line in lines for figures in line["tasks"].values())
    for line, (scale, tokens) in zip(lines, seen, strict=True):
        assert line["supervised_tokens"] == tokens
        assert scale == 1.0 / tokens


# ---------------------------------------------------------------- steps that train nothing


def feed_of(recipe: Recipe, change: Any) -> Any:
    """A memory feed whose packs of a step go through `change(step, packs)`."""
    feed = memory_feed(recipe, 0, WorkerContext())

    def stream(start: int) -> Any:
        for taken in feed.stream(start):
            yield Step(taken.step, change(taken.step, taken.packs))

    return dataclasses.replace(feed, stream=stream)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    directory = Directory(folder / "final")
    return {name: directory.read(name) for name in directory.names}


def test_a_stage_ends_with_its_samples(tmp_path, caplog):
    recipe = tiny_recipe(budget={"steps": 6})
    feed = feed_of(recipe, lambda step, packs: packs if step < 4 else [empty_pack(pack.pack) for pack in packs])
    with caplog.at_level(logging.WARNING):
        result = train(recipe, 0, feed, tmp_path / "capped", None, WorkerContext())
    assert "ends at step 4 of 6: its samples are used up" in caplog.text
    assert (result.steps, result.skipped_steps) == (4, 0)
    assert result.loss > 1.0
    assert state_of(tmp_path / "capped", 4)["total_steps"] == 6
    train_stages(0, 1, tiny_recipe(budget={"steps": 4}).model_dump(mode="json"), str(tmp_path / "short"))
    expected = weights(stage_dir(tmp_path / "short", 0))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "capped").items())
    (tmp_path / "capped" / "result.json").unlink()  # a kill before the result: nothing is trained again
    feed = feed_of(recipe, lambda step, packs: [empty_pack(pack.pack) for pack in packs])
    again = train(recipe, 0, feed, tmp_path / "capped", None, WorkerContext())
    assert dataclasses.replace(again, evaluation=result.evaluation) == result


def test_a_batch_without_a_supervised_token_is_skipped(tmp_path):
    def mute(step: int, packs: Any) -> Any:
        return [dataclasses.replace(pack, targets=np.full_like(pack.targets, -100)) for pack in packs] if step == 1 else packs

    recipe = tiny_recipe(budget={"steps": 3}, checkpoint={"every_steps": 1, "keep_last": 3})
    result = train(recipe, 0, feed_of(recipe, mute), stage_dir(tmp_path, 0), None, WorkerContext())
    assert result.skipped_steps == 1
    assert [loss is None for loss in losses(tmp_path)] == [False, True, False]
    first, second = (state_of(stage_dir(tmp_path, 0), step)["optimizer_steps"] for step in (1, 2))
    assert first == second, "the optimizer does not move on momentum and decay alone"


@pytest.mark.parametrize("steps", [3, 8])
def test_a_stage_that_makes_no_step_stops_and_is_not_complete(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(LanguageModelling, "loss", lambda self, model, batch: float("nan") * model.lm_head.weight.sum())
    monkeypatch.setattr(Objective, "skipped_in_a_row", 5)
    recipe = tiny_recipe(budget={"steps": steps}, failure={"on_nonfinite": "skip"})
    folder = stage_dir(tmp_path, 0)
    said = "made no optimizer step: all of its 3" if steps == 3 else r"5 steps in a row, up to step 5, .* loss is not finite"
    with pytest.raises(NothingLearned, match=said):
        train(recipe, 0, memory_feed(recipe, 0, WorkerContext()), folder, None, WorkerContext())
    assert not (folder / "result.json").exists()
    assert not (folder / "final").exists()


def test_groups_without_difference_stop_the_stage_with_the_reason(prompts, monkeypatch):
    monkeypatch.setattr("terrace.rl.objective.ITERATIONS_WITHOUT_AN_UPDATE", 2)
    rewards = {task: [{"name": "rl_rules:always_one"}] for task in ("digits", "capitals")}
    recipe = rl_recipe(prompts, 6, rewards=rewards, evaluate={"max_samples_per_kind": 1})
    with pytest.raises(NothingLearned, match=r"2 steps in a row, up to step 2, .* without a difference between rewards"):
        run(recipe, prompts, "no-difference")
    assert [line["loss"] for line in figures_of(prompts, "no-difference")] == [None, None]
    assert not (prompts / "no-difference" / "result.json").exists()


# ---------------------------------------------------------------- the end


def test_a_kill_before_the_suites_goes_on_with_the_suites(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    calls: Counter[str] = Counter()
    real = LanguageModelling.seen

    def counted(self: Any, example: Any, batch: Any) -> None:
        calls["trained"] += 1
        real(self, example, batch)

    def suites(stage: Any, folder: Path, context: Any) -> dict[str, dict[str, float]]:
        calls["asked"] += 1
        assert (folder / "final" / "config.json").is_file()
        if calls["asked"] == 1:
            raise Killed
        return {"counting:made": {"accuracy": 0.5}}

    monkeypatch.setattr(LanguageModelling, "seen", counted)
    monkeypatch.setattr(attempt_worker, "ask_suites", suites)
    recipe = tiny_recipe(budget={"steps": 2})
    with pytest.raises(Killed):
        train_stages(0, 1, recipe.model_dump(mode="json"), str(tmp_path))
    trained = calls["trained"]
    assert not (stage_dir(tmp_path, 0) / "result.json").exists()
    [result] = train_stages(0, 1, recipe.model_dump(mode="json"), str(tmp_path))
    assert calls == {"trained": trained, "asked": 2}
    assert result.suites == {"counting:made": {"accuracy": 0.5}}
    assert json.loads((stage_dir(tmp_path, 0) / "result.json").read_text())["suites"] == result.suites


def test_a_stop_in_the_middle_of_an_iteration_waits_for_its_end(prompts):
    """Checkpoints of several updates per rollout lie between iterations, wherever the wish to stop comes."""
    asked: list[int] = []
    recipe = rl_recipe(prompts, 4, {"updates_per_rollout": 2}, checkpoint={}, evaluate={"max_samples_per_kind": 1})
    with pytest.raises(Preempted, match="saved at step 2"):
        run(recipe, prompts, "between", should_stop=lambda: asked.append(1) or ("test" if len(asked) == 1 else None))
    assert [path.name for path in (prompts / "between" / "checkpoints").glob("step-*")] == ["step-000002"]
