"""Advantages, dynamic sampling and the easy pool against worked examples."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from terrace.generation.interface import Response
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.rl.advantages import group_advantages, overlong_penalties, zero_variance
from terrace.rl.collect import Group
from terrace.rl.dynamic_sampling import prompts_to_draw, select_groups
from terrace.rl.exchange import delivered, told
from terrace.rl.figures import task_figures
from terrace.rl.iteration import part_advantages
from terrace.rl.pools import EasyPool
from terrace.rl.prompts import Drawn
from terrace.rl.stored import load_rewards, save_rewards
from terrace.worker.context import WorkerContext

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
    # REINFORCE++: the mean 0.5 and the unbiased std sqrt((4 * 0.25 + 2 * 0.09) / 5) of all six.
    skewed = np.array([1, 0, 0, 1, 0.2, 1.4])
    whole, _ = group_advantages(skewed, groups, normalise="batch", baseline="batch", epsilon=0)
    assert whole == pytest.approx((skewed - 0.6) / np.std(skewed, ddof=1))
    by_batch, _ = group_advantages(rewards, groups, normalise="batch", epsilon=0)
    assert by_batch == pytest.approx(plain / np.sqrt(1.18 / 5))


def group_of(rewards: list[float], lengths: list[int], finished: list[bool], number: int = 0) -> Group:
    responses = tuple(
        Response(np.arange(length, dtype=np.int32), np.zeros(length, np.float32), done) for length, done in zip(lengths, finished)
    )
    nothing = ("",) * len(rewards)
    return Group(Drawn(("s", number), 0), "p", "t", 4, 0, responses, np.array(rewards), nothing, nothing, "", "")


def test_long_responses_lose_a_little_and_truncated_ones_do_not_train():
    """DAPO eq. 13 by hand: longest 20, buffer 8: nothing up to 12 tokens, half the penalty at 16, all of it at 20."""
    assert overlong_penalties(np.array([1, 12, 16, 20]), 20, 8, 0.5) == pytest.approx([0, 0, -0.25, -0.5])
    part = [group_of([1, 1, 0, NAN], [12, 16, 20, 3], [True, True, False, True]), group_of([0.5, 0.5], [20, 20], [False, False], 1)]
    given = {"max_response_tokens": 20, "normalise": "none"}
    plain = part_advantages(part, GrpoOptions(**given))
    assert plain[0] == pytest.approx([1 / 3, 1 / 3, -2 / 3, NAN], nan_ok=True)
    shaped = part_advantages(part, GrpoOptions(**given, overlong_buffer_tokens=8, overlong_penalty=0.5))
    mean = (1 + 0.75 - 0.5) / 3
    assert shaped[0] == pytest.approx([1 - mean, 0.75 - mean, -0.5 - mean, NAN], nan_ok=True)
    assert shaped[1] == pytest.approx([0, 0])
    left = part_advantages(part, GrpoOptions(**given, truncated="leave_out"))
    assert left[0] == pytest.approx([1 / 3, 1 / 3, NAN, NAN], nan_ok=True)  # the one cut off still counted in the mean
    assert np.isnan(left[1]).all()


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


def test_what_ranks_are_told_of_a_group_is_small():
    tokens = np.arange(4096, dtype=np.int32)
    said = tuple(Response(tokens[: 4096 - 3 * n], np.zeros(4096 - 3 * n, np.float32), n % 2 == 0) for n in range(16))
    reasons = ({"counting": "'4': count"},) * 16
    group = Group(Drawn(("s", 1), 0), "p", "t", 40, 9, said, np.ones(16), (), ("x" * 9000,) * 16, "why?", "4", reasons, 0.25)
    small = told(group)
    assert len(pickle.dumps(small)) < 3_000 < len(pickle.dumps(group)) / 100
    assert group.whole
    assert not small.whole
    assert task_figures([small]) == task_figures([group])
    assert small.response_tokens == group.response_tokens
    (back,) = delivered([group], [0], WorkerContext())
    assert back.responses is group.responses
