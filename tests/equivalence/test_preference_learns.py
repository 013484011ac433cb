"""A comparing stage learns from drawn scenes: which of two answers about a picture is right, on pictures that it has not seen."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from rl_stage import pair_recipe, run

from terrace.data.prepare import prepare_data
from terrace.demo import scenes

KINDS = ("shapes", "chart", "window")


def write_scenes(folder: Path, count: int) -> None:
    """A drawn scene of one of three kinds; the chosen answer names its kind, the rejected one another of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        kind = KINDS[number % 3]
        scenes.DRAWERS[kind](7_000 + number).picture.save(folder / f"{number}.png")
        wrong = random.Random(number).choice([other for other in KINDS if other != kind])
        ask = {"role": "user", "content": "<image>What kind of picture is it?"}
        rows.append({
            "messages": [ask, {"role": "assistant", "content": kind}], "rejected_response": wrong, "images": [f"{number}.png"],
        })  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("objective", "least"), [("dpo", 0.9), ("mpo", 0.9), ("kto", 0.9), ("orpo", 0.9), ("simpo", 0.9)])
def test_held_out_preferences_are_learnt(tmp_path, objective, least):
    torch.set_num_threads(1)
    write_scenes(tmp_path, 460)
    parts = {part: {"lr": 2e-3} for part in ("vision", "projector", "language")}
    values = pair_recipe(
        tmp_path, steps=60, objective=objective, train=parts, batch={"packs": 16}, sequence_length=1024,
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
