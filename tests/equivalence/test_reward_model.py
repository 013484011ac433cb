"""A reward model learns its pairs, its folder serves as a reward with the same scores, and the loss is Bradley-Terry's."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from rl_stage import rl_recipe, run

from terrace.data.prepare import load_prepared, prepare_data
from terrace.objectives.reward_model import pair_batch, summed_preference_loss
from terrace.recipe.schema import Recipe
from terrace.rewards.learned import _opened, reward_model
from terrace.rewards.types import RewardItem
from terrace.rl.pairs import lay_out
from terrace.rl.prompts import PairReader, held_out


def test_a_reward_model_stage_and_its_reward(tmp_path):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        image = "<image>" * (number % 2)
        rows.append({
            "messages": [
                {"role": "user", "content": f"{image}Say something nice, number {number}"},
                {"role": "assistant", "content": "thank you " * int(rng.integers(1, 4))},
            ],
            "rejected_response": "go away " * int(rng.integers(1, 4)),
        })  # fmt: skip
        if image:
            Image.fromarray(rng.integers(0, 255, (40 + number, 60, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
            rows[-1]["images"] = [f"{number}.png"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = rl_recipe(tmp_path).model_dump(mode="json")
    values["data"]["sources"] = {
        "pairs": {"uri": str(tmp_path / "pairs.jsonl"), "kind": "preference", "holdout_samples": 8}
    }
    values["stages"][0] |= {
        "objective": "reward_model", "grpo": None, "rewards": {}, "mixture": {"weights": {"pairs": 1.0}},
        "budget": {"steps": 12}, "batch": {"packs": 8}, "checkpoint": {"every_steps": 6},
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    prepare_data(recipe, tmp_path, use_ray=False)
    prepared = load_prepared(tmp_path / "data")
    folder = tmp_path / "stage"
    result = run(recipe, tmp_path, "stage")
    assert result.evaluation["after"]["preference/accuracy"] == 1.0
    assert result.evaluation["after"]["preference/loss"] < result.evaluation["before"]["preference/loss"] - 0.1

    # The folder as a reward.
    path = str(folder / "final")
    items = [RewardItem("Say something nice, number 3", text, None) for text in ("thank you thank you ", "go away ")]
    nice, rude = reward_model(items, path=path)
    assert 0 < rude < nice < 1
    unread = items[0]._replace(metadata={"image_sizes": [[60, 41]]})
    assert reward_model([items[0], unread, items[1]], path=path) == [nice, None, rude], "its image was not sent"
    assert reward_model(items, path=path, max_tokens=16) == [None, None]

    # The training loss of held-out pairs, with and without images, is that of the scores the reward reports.
    reader = PairReader(recipe, 0, prepared, prepared.tokenizer())
    pairs = reader.read(held_out(recipe, 0, prepared, 8))
    assert {bool(pair.prompt.images) for pair in pairs} == {True, False}
    judge = _opened(path, "cpu")
    with torch.no_grad():
        loss = float(summed_preference_loss(judge.model, pair_batch(lay_out(pairs), "cpu", torch.float32)))
    both = [
        RewardItem(
            pair.prompt.text,
            judge.tokenizer.decode(answer.tolist(), skip_special_tokens=True),
            None,
            pair.prompt.reward_metadata,
        )
        for pair in pairs
        for answer in pair.answers
    ]
    values = [math.log(value / (1 - value)) for value in reward_model(both, path=path, items_per_batch=6)]
    expected = sum(math.log1p(math.exp(values[at + 1] - values[at])) for at in range(0, len(values), 2))
    assert loss == pytest.approx(expected, rel=1e-3)

    # It looks at the picture: another one in its place is another score.
    seen = next(item for item in both if item.metadata.get("images"))
    other = next(item.metadata["images"] for item in reversed(both) if item.metadata.get("images"))
    swapped = seen._replace(metadata={**seen.metadata, "images": other})
    first, second = reward_model([seen, swapped], path=path)
    assert first != second
