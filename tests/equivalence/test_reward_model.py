"""A reward model learns its pairs, its folder serves as a reward with the same scores, and the loss is Bradley-Terry's."""

from __future__ import annotations

import math

import pytest
import torch
from rl_stage import figures_of, pair_recipe, rl_recipe, run, write_pairs

from terrace.data.prepare import load_prepared, prepare_data
from terrace.errors import InputError
from terrace.objectives.reward_model import pair_batch, summed_preference_loss
from terrace.rewards.learned import _opened, reward_model
from terrace.rewards.types import RewardItem
from terrace.rl.pairs import lay_out
from terrace.rl.prompts import PairReader, held_out


def test_a_reward_model_stage_and_its_reward(tmp_path):
    torch.set_num_threads(1)
    write_pairs(tmp_path)
    recipe = pair_recipe(tmp_path, checkpoint={"every_steps": 6})
    prepare_data(recipe, tmp_path, use_ray=False)
    prepared = load_prepared(tmp_path / "data")
    folder = tmp_path / "stage"
    result = run(recipe, tmp_path, "stage")
    assert result.evaluation["after"]["preference/accuracy"] == 1.0
    assert result.evaluation["after"]["preference/loss"] < result.evaluation["before"]["preference/loss"] - 0.1

    after = result.evaluation["after"]

    # The folder as a reward.
    path = str(folder / "final")
    items = [RewardItem("Say something nice, number 3", text, None) for text in ("thank you thank you ", "go away ")]
    nice, rude = reward_model(items, path=path)
    assert 0 < rude < nice < 1
    deviation, mean = after["preference/score_deviation"], after["preference/score_mean"]
    (placed,) = reward_model(items[:1], path=path, centre=mean, scale=deviation)
    assert math.log(placed / (1 - placed)) == pytest.approx((math.log(nice / (1 - nice)) - mean) / deviation, rel=1e-3)
    with pytest.raises(InputError, match="scale 0 must be above 0"):
        reward_model(items, path=path, scale=0)
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

    # What a gate may name of the scores is what the reward gives for the held-out answers.
    assert abs(sum(values) / len(values) - mean) < 0.05 * deviation  # texts are read again here, token for token or nearly

    # Its own rows as prompts: they have no solution, and none is asked for. Values are the model's, none is missing.
    source = recipe.data.sources["pairs"].model_copy(update={"task": "chat"})
    grpo = {"prompts_per_iteration": 2, "samples_per_prompt": 3, "max_response_tokens": 4, "max_sampling_rounds": 1}
    rl = rl_recipe(
        tmp_path, 1, grpo, rewards={"chat": [{"name": "reward_model", "options": {"path": path}}]}, mixture={"weights": {"pairs": 1.0}},
        evaluate={"max_samples_per_kind": 1},
    )  # fmt: skip
    rl = rl.model_copy(update={"data": rl.data.model_copy(update={"sources": {"pairs": source}})})
    run(rl, tmp_path, "policy")
    (line,) = figures_of(tmp_path, "policy")
    assert line["tasks"]["chat"]["reward_failures"] == 0
    assert 0 < line["tasks"]["chat"]["reward"] < 1

    # It looks at the picture: another one in its place is another score.
    seen = next(item for item in both if item.metadata.get("images"))
    other = next(item.metadata["images"] for item in reversed(both) if item.metadata.get("images"))
    swapped = seen._replace(metadata={**seen.metadata, "images": other})
    first, second = reward_model([seen, swapped], path=path)
    assert first != second
