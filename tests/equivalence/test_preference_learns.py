"""A comparing stage learns from drawn scenes: which of two answers about a picture is right, on pictures that it has not seen."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from rl_stage import pair_recipe, run

from terrace.data.prepare import prepare_data
from terrace.demo import scenes

COLOURS = ("red", "green", "blue")


def write_scenes(folder: Path, count: int) -> None:
    """One shape a picture, in one of three colours; the chosen answer names its colour, the rejected one another of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    drawn = (scenes.draw_shapes(seed, most=1) for seed in itertools.count(7_000))
    for number, scene in enumerate(itertools.islice((scene for scene in drawn if scene.things[0].colour in COLOURS), count)):
        scene.picture.save(folder / f"{number}.png")
        right = scene.things[0].colour
        wrong = random.Random(number).choice([colour for colour in COLOURS if colour != right])
        ask = {"role": "user", "content": "<image>Which colour is the shape?"}
        rows.append({
            "messages": [ask, {"role": "assistant", "content": right}], "rejected_response": wrong, "images": [f"{number}.png"],
        })  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("objective", "least"), [("dpo", 0.9), ("kto", 0.9)])
def test_held_out_preferences_are_learnt(tmp_path, objective, least):
    torch.set_num_threads(1)
    write_scenes(tmp_path, 460)
    parts = {part: {"lr": 5e-3} for part in ("vision", "projector", "language")}
    values = pair_recipe(
        tmp_path, steps=250, objective=objective, train=parts, batch={"packs": 16}, sequence_length=1024,
        evaluate={"max_samples_per_kind": 60}, checkpoint={}, pixels={"min": 784, "max": 12_544},
        schedule={"kind": "cosine", "warmup": 20}, optimizer={"betas": [0.9, 0.98], "weight_decay": 0.0},
    ).model_dump(mode="json")  # fmt: skip
    values["data"]["sources"]["pairs"]["holdout_samples"] = 60
    recipe = type(pair_recipe(tmp_path)).model_validate(values)
    prepare_data(recipe, tmp_path, use_ray=False)
    found = run(recipe, tmp_path, objective).evaluation
    print(objective, found)
    assert found["before"]["preference/accuracy"] == pytest.approx(0.5, abs=0.15)
    assert found["after"]["preference/accuracy"] >= least
