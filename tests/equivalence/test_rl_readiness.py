"""Prompts that no reward can judge are found before the first step of an on-policy stage, named, and left out where the recipe says so."""

from __future__ import annotations

import json
import logging

import pytest
from damage import flip
from rl_stage import figures_of, rl_recipe, run, write_prompts

from terrace.data.prepare import load_prepared, prepare_data
from terrace.errors import DamagedData, InputError
from terrace.recipe.identity import stage_hash
from terrace.recipe.schema import Recipe
from terrace.rewards.sandbox import SandboxPool
from terrace.rl import readiness
from terrace.rl.environments import Environments
from terrace.rl.prompt_feed import open_feed
from terrace.worker.context import WorkerContext

REWARDS = {"digits": [{"name": "math"}], "capitals": [{"name": "rl_rules:share_of_capitals"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts of which row 5 of `digits` has no solution, row 6 another task, and row 7 a solution that no number is."""
    folder = tmp_path_factory.mktemp("readiness")
    write_prompts(folder)
    rows = [json.loads(line) for line in (folder / "digits.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["id"] = f"row-{number}"
    del rows[5]["solution"]
    rows[6]["task"] = "colours"
    rows[7]["solution"] = "\\frac{"
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data(recipe_of(folder), folder, use_ray=False)
    return folder


def recipe_of(folder, on_unready="stop") -> Recipe:
    options = {"max_sampling_rounds": 1, "prompts_per_iteration": 44, "samples_per_prompt": 3}
    values = rl_recipe(folder, 1, options, rewards=REWARDS).model_dump(mode="json")
    values["data"]["sources"]["digits"] |= {"on_unready": on_unready, "holdout_samples": 1}
    return Recipe.model_validate(values)


def test_unready_prompts_refuse_the_stage_and_are_left_out_where_the_recipe_says_so(folder, monkeypatch, caplog):
    with pytest.raises(InputError) as refused:
        run(recipe_of(folder), folder, "run")
    first, *lines = str(refused.value).splitlines()
    assert first == "stage morl: 3 of 24 prompts of source digits cannot be judged; no step was made"
    assert [line.split(":")[0].strip() for line in lines[:3]] == [f"digits/row-{number}" for number in (5, 6, 7)]
    assert "`solution`" in lines[0]
    assert "its task has no reward" in lines[1]
    assert "'\\\\frac{'" in lines[2]
    assert "data.sources.digits.on_unready: skip" in lines[3]
    stage_dir = folder / "run"
    assert not (stage_dir / "metrics.jsonl").exists()
    assert not (stage_dir / "ready.json").exists()

    skipping = recipe_of(folder, "skip")
    assert stage_hash(skipping, 0) == stage_hash(recipe_of(folder), 0), "the run may go on under the setting"
    with caplog.at_level(logging.WARNING, logger="terrace"):
        result = run(skipping, folder, "run")
    assert any("3 of 24 prompts of source digits cannot be judged and are left out" in line for line in caplog.messages)
    listed = [json.loads(line) for line in (stage_dir / "unready.jsonl").read_text().splitlines()]
    assert [(one["source"], one["sample"]) for one in listed] == [("digits", f"row-{number}") for number in (5, 6, 7)]
    assert all(one["reason"] for one in listed)
    (line,) = figures_of(folder, "run")
    assert result.steps == 1
    assert result.unready_prompts == json.loads((stage_dir / "result.json").read_text())["unready_prompts"] == 3
    assert line["unready_prompts"] > 0
    assert line["groups_drawn"] + line["unready_prompts"] == 44
    assert "colours" not in line["tasks"]
    judgements = json.loads((stage_dir / "calibration.json").read_text())["shown"]["digits"]
    assert all(one["reasons"]["math"] for one in judgements), "what was read and what decided is told of every response"

    # The same stage opened again judges nothing; told to stop for such prompts, it judges again and refuses.
    judged = []
    judge = SandboxPool.judge
    monkeypatch.setattr(SandboxPool, "judge", lambda self, rule, *rest: judged.append(rule) or judge(self, rule, *rest))
    assert names_of(skipping, folder, stage_dir) == ["row-5", "row-6", "row-7"]
    assert not judged
    with pytest.raises(InputError, match="3 of 24 prompts"):
        names_of(recipe_of(folder), folder, stage_dir)
    assert judged


def test_damaged_rows_follow_the_setting_and_are_looked_at_again(folder, tmp_path, monkeypatch, caplog):
    prepared = load_prepared(folder / "data")
    values = recipe_of(folder, "skip").model_dump(mode="json")
    name = flip(prepared, "digits", 9)
    try:
        with pytest.raises(DamagedData, match=r"(?s)1 of 24 prompts of source digits cannot be read.*sample row-9.*on_damage: skip"):
            names_of(Recipe.model_validate(values), folder, tmp_path)
        assert not (tmp_path / "ready.json").exists()
        values["data"]["sources"]["digits"]["on_damage"] = "skip"
        assert names_of(Recipe.model_validate(values), folder, tmp_path) == ["row-5", "row-6", "row-7"]
        assert "1 of 24 prompts of source digits cannot be read and are left out when drawn" in caplog.text
    finally:
        assert flip(prepared, "digits", 9) == name == "digits/row-9"
    judged = []
    judge = SandboxPool.judge
    monkeypatch.setattr(SandboxPool, "judge", lambda self, rule, items, *rest: judged.append(len(items)) or judge(self, rule, items, *rest))
    for expected in ([1], []):
        judged.clear()
        assert names_of(Recipe.model_validate(values), folder, tmp_path) == ["row-5", "row-6", "row-7"]
        assert judged == expected, "the row that can be read again, once"


def test_ranks_share_the_rows_and_know_the_same(folder, tmp_path, monkeypatch):
    """Each of two ranks judges half; what the other found comes by the exchange."""
    hands = []
    monkeypatch.setattr(readiness, "barrier", lambda context: None)
    monkeypatch.setattr(readiness, "from_rank_zero", lambda value, context: value)
    for rank in range(2):
        monkeypatch.setattr(readiness, "gather_objects", lambda mine, context: hands.append(mine) or [mine])
        names_of(recipe_of(folder, "skip"), folder, tmp_path / str(rank), rank, 2)
    assert sorted(row.sample for hand in hands for row in hand) == ["row-5", "row-6", "row-7"]
    assert all(hands)
    monkeypatch.setattr(readiness, "gather_objects", lambda mine, context: hands)
    for rank in range(2):
        assert names_of(recipe_of(folder, "skip"), folder, tmp_path / f"again-{rank}", rank, 2) == ["row-5", "row-6", "row-7"]
    assert not (tmp_path / "again-1" / "ready.json").exists(), "rank 0 alone writes"


def names_of(recipe, folder, stage_dir, rank=0, world_size=1) -> list[str]:
    """The samples that a rank leaves out. Collectives are those of one process."""
    stage_dir.mkdir(exist_ok=True)
    context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    feed = open_feed(recipe, 0, load_prepared(folder / "data"), context)
    found = feed.readiness
    with SandboxPool(1) as pool:
        environments = Environments({}, (), pool, feed.reader.sights)
        return [row.sample for row in found.unready_rows(stage_dir, pool.judge, environments, context, lambda: None)]
