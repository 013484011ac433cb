"""A stage whose image sizes and mixture change after its second step, killed before and after the change: the same bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from processes import run_ranks
from ranks import run_prepared
from tiny_recipes import tiny

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.order.plan import StagePlan
from terrace.data.prepare import load_prepared, prepare_data
from terrace.data.stream.held_out import held_out_packs
from terrace.errors import Preempted
from terrace.recipe.loading import parse_recipe
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

SMALL, LARGE = {"min": 784, "max": 3_136}, {"min": 784, "max": 12_544}


def recipe_of(folder: Path) -> Recipe:
    whole = tiny("qwen2-vl-7b", folder, steps=4).model_dump(mode="json", exclude_none=True)
    [stage, *_] = whole["stages"]
    stage |= {"pixels": SMALL, "mixture": {"weights": {"captions": 1.0, "ocr": 1.0, "qa": 0.0}},
              "changes": [{"step": 2, "pixels": LARGE, "weights": {"captions": 0.0, "qa": 1.0}}]}  # fmt: skip
    return parse_recipe(whole | {"stages": [stage]})


def weights(run_dir: Path) -> str:
    [file] = (run_dir / "stages" / "01-vit-pretraining" / "final").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "stages" / "01-vit-pretraining" / "metrics.jsonl").read_text().splitlines()]


def test_a_changing_stage_is_resumed_exactly_and_ends_as_it_became(tmp_path: Path) -> None:
    recipe, run_dir = recipe_of(tmp_path / "rows"), tmp_path / "run"
    prepare_data(recipe, run_dir, use_ray=False)
    result = run_stage(recipe, 0, run_dir, 1, WorkerContext())
    assert result.steps == 4
    prepared = load_prepared(run_dir / "data")
    plan = StagePlan.build(recipe, 0, prepared)
    # What was trained is what the plan says: sources and the larger pictures, from the third step on.
    trained = lines(run_dir)
    assert [line["visual_tokens"] for line in trained] == [
        sum(sum(pack.visual_tokens) for pack in plan.packs_of_step(step)) for step in range(4)
    ]
    assert [{ref.source for pack in plan.packs_of_step(step) for ref in pack.samples} for step in (1, 2)] == [
        {"captions", "ocr"}, {"ocr", "qa"}
    ]  # fmt: skip
    most = {step: max(max(pack.visual_tokens) for pack in plan.packs_of_step(step)) for step in (1, 2)}
    assert most[1] <= 4 < most[2]
    # Held-out losses, before as after, and the export's own files are those of the stage's end.
    assert max(example.image_tokens.max() for packs in held_out_packs(recipe, 0, prepared).values() for example in packs) > 4
    exported = json.loads((run_dir / "stages" / "01-vit-pretraining" / "final" / "preprocessor_config.json").read_text())
    assert LARGE["max"] in (exported.get("max_pixels"), exported.get("size", {}).get("longest_edge"))
    for stops in ([2], [1, 3]):
        again = tmp_path / f"again-{'-'.join(map(str, stops))}"
        prepare_data(recipe, again, use_ray=False)
        for attempt, stop in enumerate(stops, 1):
            asked = iter([None] * (stop - 1 - (stops[attempt - 2] if attempt > 1 else 0)))
            with pytest.raises(Preempted, match=f"saved at step {stop};"):
                run_stage(recipe, 0, again, attempt, WorkerContext(should_stop=lambda asked=asked: next(asked, "told")))
        run_stage(recipe, 0, again, len(stops) + 1, WorkerContext())
        assert weights(again) == weights(run_dir)


@pytest.mark.slow
def test_a_tower_s_square_that_grows_inside_a_stage_is_resumed_exactly(tmp_path: Path) -> None:
    """CogVLM's second stage in miniature, 2 x 2 patches and then 6 x 6: stopped before its switch, at it and behind it."""
    whole = tiny("cogvlm-17b", tmp_path / "rows", steps=2).model_dump(mode="json", exclude_none=True)
    [stage] = [stage for stage in whole["stages"] if stage["name"] == "expressions"]
    stage |= {"budget": {"steps": 4}, "name": "vit-pretraining"}
    assert [change["step"] for change in stage["changes"]] == [2]
    recipe, run_dir = parse_recipe(whole | {"stages": [stage]}), tmp_path / "run"
    prepare_data(recipe, run_dir, use_ray=False)
    assert run_stage(recipe, 0, run_dir, 1, WorkerContext()).steps == 4
    plan = StagePlan.build(recipe, 0, load_prepared(run_dir / "data"))
    pictures = [{tokens for pack in plan.packs_of_step(step) for tokens in pack.visual_tokens} - {0} for step in range(4)]
    assert pictures == [{4}, {4}, {36}, {36}]
    for stop in (1, 2, 3):
        again, asked = tmp_path / f"again-{stop}", iter([None] * (stop - 1))
        prepare_data(recipe, again, use_ray=False)
        with pytest.raises(Preempted, match=f"saved at step {stop};"):
            run_stage(recipe, 0, again, 1, WorkerContext(should_stop=lambda asked=asked: next(asked, "told")))
        run_stage(recipe, 0, again, 2, WorkerContext())
        assert weights(again) == weights(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 3])
def test_it_goes_on_with_another_number_of_workers(stop: int, tmp_path: Path) -> None:
    """Saved by one worker before or behind the change, continued by two: the losses of the uninterrupted run."""
    recipe, run_dir, again = recipe_of(tmp_path / "rows"), tmp_path / "run", tmp_path / "again"
    for folder in (run_dir, again):
        prepare_data(recipe, folder, use_ray=False)
    run_stage(recipe, 0, run_dir, 1, WorkerContext())
    asked = iter([None] * (stop - 1))
    with pytest.raises(Preempted, match=f"saved at step {stop};"):
        run_stage(recipe, 0, again, 1, WorkerContext(should_stop=lambda: next(asked, "told")))
    run_ranks(2, run_prepared, recipe.model_dump(mode="json"), str(again), 2, timeout=300)
    alone, continued = lines(run_dir), lines(again)
    assert [line["step"] for line in continued] == [1, 2, 3, 4]
    assert [line["loss"] for line in continued] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    assert [line["visual_tokens"] for line in continued] == [line["visual_tokens"] for line in alone]
