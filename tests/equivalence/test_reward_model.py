"""A reward model learns its pairs, its folder serves as a reward with the same scores, and the loss is Bradley-Terry's."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from rl_stage import rl_recipe

from terrace.data.prepare import load_prepared, prepare_data
from terrace.objectives.reward_model import summed_preference_loss
from terrace.recipe.schema import Recipe
from terrace.rewards.reward_model import _opened, reward_model
from terrace.rewards.types import RewardItem
from terrace.rl.pairs import pair_batch
from terrace.rl.prompts import PairReader, held_out
from terrace.rl.reward_model_loop import train_reward_model_stage
from terrace.train.context import WorkerContext


def test_a_reward_model_stage_and_its_reward(tmp_path):
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say something nice, number {number}"},
                {"role": "assistant", "content": "thank you " * int(rng.integers(1, 4))},
            ],
            "rejected_response": "go away " * int(rng.integers(1, 4)),
        }
        for number in range(40)
    ]
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
    folder.mkdir()
    result = train_reward_model_stage(recipe, 0, prepared, folder, None, WorkerContext())
    assert result.evaluation["after"]["preference/accuracy"] == 1.0
    assert result.evaluation["after"]["preference/loss"] < result.evaluation["before"]["preference/loss"] - 0.1

    # The folder as a reward.
    path = str(folder / "final")
    items = [RewardItem("Say something nice, number 3", text, None) for text in ("thank you thank you ", "go away ")]
    nice, rude = reward_model(items, path=path)
    assert 0 < rude < nice < 1
    assert reward_model([items[0]._replace(metadata={"image_sizes": [[1, 1]]})], path=path) == [None]

    # The training loss of held-out pairs is that of the scores the reward reports.
    reader = PairReader(recipe, 0, prepared, prepared.tokenizer())
    pairs = reader.read(held_out(recipe, 0, prepared, 4))
    model, tokenizer = _opened(path, "cpu")
    with torch.no_grad():
        loss = float(summed_preference_loss(model, pair_batch(pairs, "cpu", torch.float32)))
    expected = 0.0
    for pair in pairs:
        both = [
            RewardItem(pair.prompt.text, tokenizer.decode(answer.tolist(), skip_special_tokens=True), None)
            for answer in pair.answers
        ]
        chosen, rejected = (math.log(value / (1 - value)) for value in reward_model(both, path=path))
        expected += math.log1p(math.exp(rejected - chosen))
    assert loss == pytest.approx(expected, rel=1e-3)
