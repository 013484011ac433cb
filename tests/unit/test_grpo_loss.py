"""The policy loss and the advantages against TRL's numbers (trl_reference.json) and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from terrace.objectives import grpo
from terrace.objectives.grpo import PolicyOptions, token_logprobs, token_losses
from terrace.rl.advantages import group_advantages

REFERENCE = json.loads(Path(__file__).with_name("trl_reference.json").read_text())


@pytest.mark.parametrize("name", sorted(REFERENCE["losses"]))
def test_loss_and_gradient_equal_trl(name):
    case, inputs = REFERENCE["losses"][name], REFERENCE["inputs"]
    mask = torch.tensor(inputs["mask"], dtype=torch.bool)
    logprobs = torch.tensor(inputs["logprobs"], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor(inputs["advantages"], dtype=torch.float64)[:, None].expand(mask.shape)
    options = PolicyOptions(
        clip_low=case.get("low"),
        clip_high=case.get("high"),
        kl_coefficient=case.get("beta", 0.0),
        entropy_coefficient=case.get("entropy", 0.0),
        clip_ceiling=case.get("ceiling"),
        sequence_ratio=case.get("level") == "sequence",
        cispo=case.get("type") == "cispo",
        per_response=case.get("type") == "grpo",
    )
    tensors = {key: torch.tensor(inputs[key], dtype=torch.float64) for key in ("old", "reference", "entropies")}
    losses, _ = token_losses(
        logprobs[mask],
        tensors["entropies"][mask],
        advantages[mask],
        tensors["old"][mask] if case.get("old") else None,
        tensors["reference"][mask] if "beta" in case else None,
        options,
        mask.sum(1),
    )
    loss = losses.sum() / {"grpo": len(mask), "dr_grpo": len(mask) * 8}.get(case.get("type", ""), mask.sum())
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-12)
    assert logprobs.grad.numpy() == pytest.approx(np.array(case["gradient"]), abs=1e-12)


def test_advantages_equal_trl():
    rewards = np.array([math.nan if value is None else value for value in REFERENCE["rewards"]])
    groups = np.repeat(np.arange(3), 4)
    for normalise in ("none", "std", "batch"):
        expected = np.array([0.0 if value is None else value for value in REFERENCE["advantages"][normalise]])
        advantages, counted = group_advantages(rewards, groups, normalise=normalise, epsilon=1e-4)
        assert advantages == pytest.approx(expected, abs=1e-7)  # TRL forms the std in float32
        assert counted.tolist() == [value is not None for value in REFERENCE["rewards"]]


def test_on_policy_gradient_is_minus_advantage():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    losses, sums = token_losses(logprobs, torch.zeros(2), torch.tensor([0.5, -2.0]), None, None, PolicyOptions())
    losses.sum().backward()
    assert logprobs.grad.tolist() == [-0.5, 2.0]
    assert float(sums["clipped"]) == 0


def test_clip_stops_the_gradient_outside_the_range():
    old = torch.zeros(4)
    logprobs = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    losses, sums = token_losses(
        logprobs,
        torch.zeros(4),
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
        old,
        None,
        PolicyOptions(clip_low=0.2, clip_high=0.28),
    )
    losses.sum().backward()
    # Raising a token that is already raised, or lowering one that is already lowered, has no gradient any more.
    assert (logprobs.grad != 0).tolist() == [False, True, True, False]
    assert float(sums["clipped"]) == 2


def test_token_logprobs_divide_by_the_temperature():
    logits = torch.tensor([[0.0, 2.0, 4.0]])
    expected = math.log(math.exp(1) / (1 + math.exp(1) + math.exp(2)))
    assert float(token_logprobs(logits, torch.tensor([1]), 2.0)) == pytest.approx(expected)

@pytest.mark.parametrize("forbidden", [(), (3, 7)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_that_do_not_train_cost_no_second_copy_and_change_nothing(forbidden, temperature, monkeypatch):
    monkeypatch.setattr(grpo, "output_layer", lambda model: model)
    head, never = torch.nn.Linear(6, 50), torch.tensor(forbidden, dtype=torch.int64)
    hidden, tokens, weights = torch.randn(9, 6), torch.randint(10, 50, (9,)), torch.randn(9)
    found = []
    for trains in (True, False):
        head.zero_grad()
        rows = hidden.clone().requires_grad_()
        logprobs, entropies = grpo.logprobs_and_entropies(head, rows * 1, tokens, never, temperature, trains)
        (logprobs * weights).sum().backward()
        assert entropies.requires_grad == trains
        found.append((logprobs, entropies, rows.grad, head.weight.grad.clone(), head.bias.grad.clone()))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)
