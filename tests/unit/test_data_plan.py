"""The plan of a stage: the same packs from any position and for any number of workers, every sample exactly once."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import pairwise

import pytest
from formula_source import FormulaSource, seen, stage
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.data.look.order_command import order_facts, order_text
from terrace.data.order.balance import CostModel
from terrace.data.order.eligible import VisualRange, split_points
from terrace.data.order.plan import StagePlan
from terrace.errors import InputError
from terrace.objectives.interface import StageFeed


def plan(sources=None, **changes) -> StagePlan:
    sources = sources or [FormulaSource("a", 500), FormulaSource("b", 90)]
    return StagePlan(stage(**changes), {source.name: source for source in sources}, 0, CostModel())


@settings(max_examples=12, deadline=None)
@given(step=st.integers(0, 29), seed=st.integers(0, 5))
def test_any_step_can_be_started_from(step, seed):
    whole = [packs for _, packs in plan(seed=seed).steps()]
    fresh = plan(seed=seed)
    assert fresh.packs_of_step(step) == whole[step]
    assert [packs for _, packs in fresh.steps(step)] == whole[step:]
    restored = plan(seed=seed)
    restored.restore(fresh.state(step))
    assert [packs for _, packs in restored.steps(step)] == whole[step:]
    assert restored.packs_of_step(0) == whole[0]


def test_state_goes_on_at_once_and_refuses_another_order():
    state = plan().state(25)
    assert all(isinstance(state[key], int) for key in state if key != "plan")
    restored = plan()
    restored.restore(state)
    restored.packs_of_step(25)
    assert min(restored._windows) == state["window"] > 0  # no window before it was packed
    with pytest.raises(InputError, match="changed since"):
        plan(sequence_length=2048).restore(state)


@pytest.mark.parametrize("budget", [{"epochs": 2}, {"samples": 1_000}])
def test_a_resumed_stage_that_ends_with_its_samples_is_not_counted_again(budget):
    made = plan(budget=budget)
    assert "total_packs" not in made.state(1)  # nobody has asked, and nothing is counted for the state's sake
    steps, packs = made.total_steps, made.total_packs
    for step in (3, steps - 1, steps):
        restored = plan(budget=budget)
        restored.restore(json.loads(json.dumps(made.state(step))))
        assert (restored.total_steps, restored.total_packs) == (steps, packs)
        assert restored.packs_of_step(step) == made.packs_of_step(step)
        assert len(restored._windows) <= 2  # those of the step; no walk through the stage
        assert [found for _, found in restored.steps(step)] == [found for _, found in made.steps(step)]
        assert restored.state(step) == made.state(step)


def test_a_feed_asks_for_its_steps_once_and_only_when_they_are_read():
    asked = []
    feed = StageFeed(None, lambda: asked.append(1) or 7, lambda start: iter(()), dict, dict)
    assert not asked
    assert [feed.total_steps, feed.total_steps, len(asked)] == [7, 7, 1]
    assert StageFeed(None, total_steps=3, stream=iter, state=dict, restore=dict).total_steps == 3


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_share_the_same_packs(workers):
    made = plan()
    for step in (0, 3, 29):
        hands = made.deal(step, workers)
        assert {len(hand) for hand in hands} == {14 // workers}
        dealt = sorted((pack for hand in hands for pack in hand), key=lambda pack: pack.pack)
        assert dealt == made.packs_of_step(step)
        assert made.balance(step, workers)["max_over_mean"] <= made.balance(step, workers)["in_order"] + 1e-9


def test_a_batch_that_cannot_be_dealt_evenly_is_refused():
    with pytest.raises(InputError, match=r"batch.packs is 14, .* 4 workers"):
        plan().deal(0, 4)


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_holds_every_sample_exactly_once(epochs):
    made = plan(budget={"epochs": epochs})
    packs = [pack for _, batch in made.steps() for pack in batch]
    assert len(packs) == made.total_steps * 14
    expected = {("a", row) for row in range(500)} | {("b", row) for row in range(90)}
    assert seen(packs) == Counter(dict.fromkeys(expected, epochs))
    empty = [pack for pack in packs if not pack.samples]
    assert len(empty) < 14
    assert packs[len(packs) - len(empty) :] == empty
    assert [pack.pack for pack in packs] == list(range(len(packs)))


def test_a_budget_of_samples_is_met_exactly():
    made = plan(budget={"samples": 333})
    assert sum(seen(pack for _, batch in made.steps() for pack in batch).values()) == 333


def test_a_budget_of_tokens_counts_positions():
    assert plan(budget={"tokens": 1024 * 14 * 10}).total_steps == 10
    assert plan(budget={"tokens": 1024 * 14 * 10 + 1}).total_steps == 11


def test_shares_and_limits():
    made = plan(budget={"steps": 40})
    drawn = seen(pack for _, batch in made.steps() for pack in batch)
    share = sum(count for (name, _), count in drawn.items() if name == "a") / sum(drawn.values())
    assert share == pytest.approx(0.7, abs=0.01)
    for _, batch in made.steps():
        assert all(sum(pack.lengths) <= 1024 for pack in batch)
    limited = plan(data_loading={"window_samples": 200, "max_visual_tokens_per_pack": 150})
    for _, batch in limited.steps(20):
        assert all(sum(pack.visual_tokens) <= 150 for pack in batch)


def test_epoch_caps():
    made = plan(mixture={"weights": {"a": 0.5, "b": 0.5}, "epoch_caps": {"b": 1}}, budget={"steps": 20})
    drawn = seen(pack for _, batch in made.steps() for pack in batch)
    assert max(count for (name, _), count in drawn.items() if name == "b") == 1
    with pytest.raises(InputError, match="epoch_caps leave only"):
        plan(mixture={"weights": {"a": 0.5, "b": 0.5}, "epoch_caps": {"a": 1, "b": 1}}, budget={"steps": 20})


def test_token_weights_give_token_shares():
    sources = [FormulaSource("a", 3000, longest=100), FormulaSource("b", 3000, longest=700)]
    mixture = {"weights": {"a": 0.5, "b": 0.5}, "unit": "tokens"}
    made = plan(sources, mixture=mixture, budget={"steps": 40})
    tokens = Counter()
    for _, batch in made.steps():
        for pack in batch:
            for ref, length in zip(pack.samples, pack.lengths):
                tokens[ref.source] += length
    assert tokens["a"] / sum(tokens.values()) == pytest.approx(0.5, abs=0.02)


def test_temperature_moves_towards_size():
    made = plan(mixture={"weights": {"a": 1.0, "b": 1.0}, "temperature": 1.0})
    assert made.explain()["sources"]["a"]["share_of_samples"] == pytest.approx(500 / 590, abs=1e-4)


def test_ten_billion_samples_are_planned_at_once():
    begun = time.process_time()
    sources = [FormulaSource("a", 9 * 10**9), FormulaSource("b", 10**9)]
    made = plan(sources, sequence_length=8192, budget={"tokens": 2.4e12}, batch={"packs": 512},
                data_loading={"window_samples": 2000})  # fmt: skip
    assert made.total_steps == 572_205
    first = made.packs_of_step(0)
    assert len(first) == 512
    state = made.state(3) | {"step": 500_000, "pack": 256_000_000, "window": 5_000_000,
                             "window_first_pack": 256_000_000, "window_position": 9_950_000_000}  # fmt: skip
    made.restore(state)
    assert made.packs_of_step(500_000)[0].pack == 256_000_000
    assert time.process_time() - begun < 5  # 0.3 s on an idle machine
    assert len(made._windows) <= 16
    assert len(made._anchors) < 100


def test_an_empty_source_is_named():
    with pytest.raises(InputError, match=r"source b has no sample .*3 too long, left out"):
        plan([FormulaSource("a", 10), FormulaSource("b", 0, changes={"refused": 3})])


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 3000),
    limit=st.integers(50, 400),
    cuts=st.lists(st.integers(1, 3000), max_size=40),
    starts=st.lists(st.integers(0, 2900), max_size=8, unique=True),
)
def test_documents_are_cut_whole_images_apart(total, limit, cuts, starts):
    images, last = [], 0
    for start in sorted(starts):
        if start >= last and start + 40 <= total:
            images.append(VisualRange(start, start + 40, 38, 152, 38))
            last = start + 40
    inside = {token for image in images for token in range(image.start + 1, image.stop)}
    points = split_points(total, images, sorted({cut for cut in cuts if cut < total and cut not in inside}), limit)
    assert points[0] == 0
    assert points[-1] == total
    assert all(0 < after - before <= limit for before, after in pairwise(points))
    assert not inside & set(points)


def test_the_order_command_shows_packs_and_where_they_go():
    made = plan()
    facts = order_facts(made, 20, 10, workers=2)
    assert [pack["pack"] for pack in facts["packs"]] == list(range(20, 30))
    assert json.loads(json.dumps(facts)) == facts
    for shown, pack in zip(facts["packs"], made.packs(20, 30)):
        assert [(s["source"], s["row"], s["tokens"]) for s in shown["samples"]] == [
            (ref.source, ref.row, tokens) for ref, tokens in zip(pack.samples, pack.lengths)
        ]
        assert shown["fill"] == shown["tokens"] / 1024
        assert pack in made.deal(shown["step"], 2)[shown["worker"]]
    assert f"fill of these 10 packs: {facts['fill']:.2%}" in order_text(facts)
    assert len(order_facts(made, 30 * 14 - 3, 10)["packs"]) == 3  # the stage ends there
