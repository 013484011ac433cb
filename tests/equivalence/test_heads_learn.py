"""Heads learn to draft: what they would draft is more and more what the model chooses, and decoding needs fewer passes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rl_stage import rl_recipe

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.data.prompt import read_prompt
from terrace.data.types import Sample
from terrace.evaluate.engine import load_model
from terrace.generation.drafting import DraftingEngine
from terrace.generation.interface import Prompt, Sampling
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

COLOURS, SHAPES, PLACES = ("red", "green", "blue", "yellow"), ("circle", "square", "star"), ("left", "right", "top", "bottom")


def write_answers(folder: Path, count: int = 160) -> None:
    """Questions whose answer repeats what they say in a sentence of its own."""
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(count):
        colour, shape, place = (str(rng.choice(words)) for words in (COLOURS, SHAPES, PLACES))
        said = f"The {shape} that you see at the {place} of the picture is {colour}, and there is no other one."
        rows.append({"messages": [{"role": "user", "content": f"{place} {colour} {shape}"}, {"role": "assistant", "content": said}]})
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["mtp", "medusa"])
def test_acceptance_rises(tmp_path, kind):
    torch.set_num_threads(1)
    write_answers(tmp_path)
    values = rl_recipe(tmp_path).model_dump(mode="json")
    values["data"]["sources"] = {
        "answers": {"uri": str(tmp_path / "answers.jsonl"), "kind": "instruction", "holdout_samples": 12}
    }
    values["stages"][0] |= {
        "name": "heads", "objective": kind, "grpo": None, "rewards": {}, "mixture": {"weights": {"answers": 1.0}}, "batch": {"packs": 2},
        "train": {"language": {"lr": 3e-3}, "heads": {"lr": 3e-3}}, "budget": {"steps": 120}, "sequence_length": 512,
        "data_loading": {"engine": "inline", "window_samples": 64}, "checkpoint": {}, "schedule": {"kind": "cosine", "warmup": 5},
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    prepare_data(recipe, tmp_path / "run", use_ray=False)
    result = run_stage(recipe, 0, tmp_path / "run", 1, WorkerContext())
    before, after = result.evaluation["before"]["acceptance/1"], result.evaluation["after"]["acceptance/1"]
    model = load_model(tmp_path / "run" / "stages" / "01-heads" / "final", "cpu")
    assert isinstance(model.engine, DraftingEngine)
    prompts = []
    for number, words in enumerate(("left red star", "top blue circle", "right green square")):
        turns = [{"role": "user", "content": [{"type": "text", "text": words}]}, {"role": "assistant", "content": []}]
        read = read_prompt(Sample(f"p{number}", "instruction", turns[:1]), [], [], model.tokenizer, model.sight.family, model.sight.pixels)
        prompts.append(Prompt(**vars(read.inputs), key=("p", number), id=f"p{number}"))
    groups = model.engine.generate(prompts, Sampling(1, 60, 0.0))
    print(kind, before, result.evaluation["after"], model.engine.acceptance, [len(group[0].tokens) for group in groups])
    assert before < 0.3
    assert after > 0.9
    assert model.engine.acceptance > (0.8 if kind == "mtp" else 0.5)
