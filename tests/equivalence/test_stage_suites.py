"""Suites at a stage's end: the scores of the exported model, in the stage's result, the same on one worker and on two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from processes import run_ranks

from terrace.curriculum.attempt_worker import run_stage
from terrace.curriculum.gates import metric_value
from terrace.data.prepare import prepare_data
from terrace.demo.corpus import write_corpus
from terrace.errors import InputError
from terrace.evaluate.replies import Settings
from terrace.evaluate.run import evaluate_model, read_results
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
LIMIT = 5


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    """A one-stage recipe on drawn captions with two suites of drawn prompts, prepared."""
    folder = tmp_path_factory.mktemp("suites")
    corpus = write_corpus(folder / "corpus", samples={"captions": 24, "rl/counting": 8, "rl/grounding": 8}, workers=1)
    suites = [f"counting:{corpus}/rl/counting.jsonl", f"grounding:{corpus}/rl/grounding.jsonl"]
    loaded = load_recipe(RECIPE, [f"data.sources.captions.uri={corpus}/captions.jsonl", "tokenizer.train_vocabulary_size=400"])
    recipe = loaded.model_dump(mode="json")
    recipe["data"]["sources"] = {"captions": recipe["data"]["sources"]["captions"]}
    recipe["stages"] = recipe["stages"][:1]
    recipe["stages"][0].update(budget={"steps": 2}, evaluate={"suites": suites, "limit": LIMIT}, data_loading={"engine": "inline"})
    prepare_data(Recipe.model_validate(recipe), folder / "one")
    prepare_data(Recipe.model_validate(recipe), folder / "two")
    return {"recipe": recipe, "folder": str(folder), "suites": suites}


def train(rank: int, world_size: int, values: dict[str, Any], run_dir: str) -> dict[str, Any]:
    context = WorkerContext(rank, world_size, rank, "cpu", lambda *_: None, lambda: None)
    return run_stage(Recipe.model_validate(values["recipe"]), 0, Path(run_dir), 1, context).suites


def test_scores_are_those_of_the_exported_model_on_any_number_of_workers(values):
    folder = Path(values["folder"])
    alone = train(0, 1, values, str(folder / "one"))
    both = run_ranks(2, train, values, str(folder / "two"))
    assert set(alone) == {"counting:counting", "grounding:grounding"}
    assert both == [alone, alone]

    stage_dir = folder / "one" / "stages" / "01-projector-warmup"
    written = json.loads((stage_dir / "result.json").read_text())
    assert written["suites"] == alone
    scores, rows = read_results(stage_dir / "evaluation")
    assert len(rows) == 2 * LIMIT
    again = evaluate_model(stage_dir / "final", values["suites"], folder / "again", Settings(limit=LIMIT))
    assert again["suites"] == scores["suites"]
    assert [row.answer for row in read_results(folder / "again")[1]] == [row.answer for row in rows]

    measured = metric_value(written, "eval/grounding:grounding/mean_iou")
    assert measured == alone["grounding:grounding"]["mean_iou"]
    assert math.isfinite(measured)
    assert metric_value(written, "eval/grounding:grounding/nothing") is None


def test_a_missing_suite_stops_the_stage_before_it_trains(values, tmp_path):
    recipe = json.loads(json.dumps(values["recipe"]))
    recipe["stages"][0]["evaluate"]["suites"] = ["counting:nowhere/counting.jsonl"]
    prepare_data(Recipe.model_validate(recipe), tmp_path)
    with pytest.raises(InputError, match=r"nowhere/counting\.jsonl does not exist"):
        train(0, 1, {"recipe": recipe}, str(tmp_path))
    assert not (tmp_path / "stages" / "01-projector-warmup" / "metrics.jsonl").exists()
