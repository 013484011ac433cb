"""Advantages, dynamic sampling and the easy pool against worked examples."""

from __future__ import annotations

import json

import numpy as np
import pytest

from terrace.rl.advantages import group_advantages, zero_variance
from terrace.rl.dynamic_sampling import prompts_to_draw, select_groups
from terrace.rl.pools import EasyPool
from terrace.rl.stored import load_rewards, save_rewards

NAN = float("nan")


def test_advantages_worked_by_hand():
    # Group 0: rewards 1, 0, 0, 1: mean 0.5, unbiased std sqrt(4 * 0.25 / 3) = 0.57735. Group 1: 0.2, 0.8: mean 0.5, std
    # 0.42426.
    rewards, groups = np.array([1, 0, 0, 1, 0.2, 0.8]), np.array([7, 7, 7, 7, 9, 9])
    advantages, counted = group_advantages(rewards, groups, epsilon=0)
    assert counted.all()
    half, diagonal = np.sqrt(3) / 2, np.sqrt(0.5)
    assert advantages == pytest.approx([half, -half, -half, half, -diagonal, diagonal])
    plain, _ = group_advantages(rewards, groups, normalise="none")
    assert plain == pytest.approx([0.5, -0.5, -0.5, 0.5, -0.3, 0.3])
    # Leave one out: 1 - mean(0, 0, 1) = 2/3.
    others, _ = group_advantages(rewards, groups, normalise="none", baseline="leave_one_out")
    assert others == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, -0.6, 0.6])


def test_failed_rewards_are_no_part_of_their_group():
    rewards, groups = np.array([1.0, NAN, 0.0, NAN, 1.0]), np.array([0, 0, 0, 1, 1])
    advantages, counted = group_advantages(rewards, groups, normalise="none")
    assert counted.tolist() == [True, False, True, False, False]
    assert advantages.tolist() == [0.5, 0.0, -0.5, 0.0, 0.0]


def test_equal_rewards_give_no_advantage():
    advantages, counted = group_advantages(np.full(4, 0.1), np.zeros(4))
    assert counted.all()
    assert np.abs(advantages).max() < 1e-6
    assert zero_variance(np.array([0.1, 0.1 + 1e-12]))
    assert zero_variance(np.array([1.0, NAN]))
    assert not zero_variance(np.array([0.0, 1.0, NAN]))


def test_dynamic_sampling_keeps_the_first_informative_groups():
    rewards = [np.array(group, float) for group in ([1, 1], [0, 1], [NAN, 1], [0, 0], [1, 0], [0, 1])]
    selection = select_groups(rewards, wanted=2, dynamic=True)
    assert selection.kept == (1, 4)
    assert (selection.without_difference, selection.unjudged, selection.surplus, selection.missing) == (2, 1, 1, 0)
    assert select_groups(rewards, wanted=3, dynamic=False).kept == (0, 1, 3)
    assert select_groups(rewards, wanted=5, dynamic=True).missing == 2


def test_rounds_draw_by_the_share_kept_so_far():
    assert prompts_to_draw(8, 0, 0) == 8
    assert prompts_to_draw(4, 4, 8) == 8
    assert prompts_to_draw(5, 0, 8) == 15  # nothing kept yet: at most three times what is missing
    assert prompts_to_draw(0, 8, 8) == 0


def test_easy_pool_takes_out_brings_back_and_resumes():
    pool = EasyPool(again=0.25)
    pool.record(("a", 1), 1.0)
    pool.record(("a", 2), 0.9)
    pool.record(("b", 3), 1.0)
    assert pool.takes_out(("a", 1))
    assert not pool.takes_out(("a", 2))
    picks = [pool.pick(5, draw) for draw in range(4000)]
    assert np.mean([pick is not None for pick in picks]) == pytest.approx(0.25, abs=0.03)
    assert {pick for pick in picks if pick} == {("a", 1), ("b", 3)}
    again = EasyPool(again=0.25)
    again.restore(pool.state())
    assert [again.pick(5, draw) for draw in range(4000)] == picks
    pool.record(("a", 1), 0.5)
    assert not pool.takes_out(("a", 1))
    strict = EasyPool(drop_above=0.8)
    strict.record(("a", 2), 0.9)
    assert strict.takes_out(("a", 2))
    assert strict.pick(0, 0) is None
    none = EasyPool()
    none.record(("a", 1), 1.0)
    assert not none.takes_out(("a", 1))


# ---------------------------------------------------------------- what an iteration keeps


def test_rewards_come_back_with_their_reasons_and_from_files_without(tmp_path):
    path, identity = tmp_path / "rewards.json", {"iteration": 3}
    rewards = [[(1.0, None, {"math": "'4': number"})], [(None, "the service said no", {}), (0.0, None, {"math": "'5': number"})]]
    save_rewards(path, identity, rewards)
    assert load_rewards(path, identity) == rewards
    assert load_rewards(path, {"iteration": 4}) is None
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "rewards": [[one[:2] for one in group] for group in stored["rewards"]]}))
    assert load_rewards(path, identity) == [[(*one[:2], {}) for one in group] for group in rewards]
