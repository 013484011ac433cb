"""Order, mixture, packing and dealing: properties that hold for any seed, size and weights."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.data.order import balance
from terrace.data.order.balance import CostModel, cost_model, deal, deal_in_order, max_over_mean
from terrace.data.order.mixture import LONGEST_WRITTEN, Interleave, whole_weights
from terrace.data.order.packing import default_window, lookahead, pack_best_fit, pack_window
from terrace.data.order.permutation import BLOCK, GROUP_BLOCKS, permute, shuffled_rows, source_rows
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.families.qwen2_vl import Qwen2VL

FEW = settings(max_examples=40, deadline=None)


@FEW
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63))
def test_a_permutation_covers_everything_once(size, seed):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed)), np.arange(size))


@pytest.mark.parametrize("size", [16_384, 16_385, 16_640, 40_000, 100_001])
def test_block_shuffle_covers_everything_once(size):
    rows = shuffled_rows(np.arange(size), size, 5)
    assert np.array_equal(np.sort(rows), np.arange(size))
    assert not np.array_equal(rows, shuffled_rows(np.arange(size), size, 6))


def test_block_shuffle_keeps_reads_together_and_mixes():
    rows = shuffled_rows(np.arange(10**6), 10**6, 1)
    group = rows[: BLOCK * GROUP_BLOCKS]
    assert len(np.unique(group // BLOCK)) <= GROUP_BLOCKS + 1  # a stretch of the order reads from few places
    assert abs(np.corrcoef(np.arange(10**6), rows)[0, 1]) < 0.1


def test_any_position_of_a_huge_source_is_arithmetic():
    size = 10**13
    some = np.array([0, 1, 12345, 10**12, size - 1])
    rows = source_rows(some, size, 3, "web")
    assert ((rows >= 0) & (rows < size)).all()
    assert len(set(rows.tolist())) == 5
    assert np.array_equal(source_rows(some[2:3], size, 3, "web"), rows[2:3])


def test_order_is_pinned():
    """A change here changes the data order of every run that resumes: only ever on purpose."""
    assert permute(np.arange(10), 10, 1).tolist() == PINNED_PERMUTATION
    assert shuffled_rows(np.array([0, 1, 99_999]), 100_000, 1).tolist() == PINNED_ROWS


PINNED_PERMUTATION = [1, 0, 4, 9, 8, 5, 6, 2, 7, 3]
PINNED_ROWS = [4062, 61_468, 81_431]


def test_epochs_have_their_own_orders():
    rows = source_rows(np.arange(300), 100, 9, "a")
    for epoch in range(3):
        assert sorted(rows[epoch * 100 : (epoch + 1) * 100].tolist()) == list(range(100))
    assert rows[:100].tolist() != rows[100:200].tolist()
    assert rows[:100].tolist() != source_rows(np.arange(100), 100, 9, "b").tolist()


weights_of = st.lists(st.decimals("0.001", "5", places=3).map(float), min_size=1, max_size=7)
long_weights = st.lists(st.integers(10**6, 10**17), min_size=1, max_size=9).filter(lambda whole: sum(whole) > LONGEST_WRITTEN)


@FEW
@given(weights=long_weights, start=st.integers(0, 10**14), cap=st.integers(1, 300))
def test_weights_of_any_precision_are_exact_and_computed_from_the_place(weights, start, cap):
    names = [f"s{number}" for number in range(len(weights))]
    given = {name: Fraction(weight, 10**17) for name, weight in zip(names, weights)}
    whole, total = whole_weights(given), sum(weights)
    assert all(Fraction(whole[name], sum(whole.values())) == Fraction(weight, total) for name, weight in zip(names, weights))
    made = Interleave(names, whole, [None] * len(names))
    for begin in (0, start):
        sources, draws = made.draw(begin, begin + 300)
        before = made.counts(begin)
        for length in (1, 2, 77, 300):
            counts = before + np.bincount(sources[:length], minlength=len(names))
            assert np.array_equal(counts, made.counts(begin + length))
            allowed = math.log2(len(names)) / 2 + 1
            assert all(abs(int(c) - Fraction(w * (begin + length), total)) <= allowed for c, w in zip(counts, weights))
        assert all(draws[sources == n].tolist() == list(range(before[n], before[n] + (sources == n).sum())) for n in range(len(names)))
        again = made.draw(begin + 40, begin + 300)
        assert np.array_equal(sources[40:], again[0])
        assert np.array_equal(draws[40:], again[1])
    capped = Interleave(names, whole, [cap] * len(names))
    assert np.bincount(capped.draw(0, cap * len(names) + 5)[0], minlength=len(names)).tolist() == [cap] * len(names)


def test_seven_and_more_decimals_are_not_rounded():
    weights = whole_weights({"a": 0.3000001, "b": 0.6999999, "c": 0.00000001})
    assert weights == {"a": 30_000_010, "b": 69_999_990, "c": 1}
    made = Interleave(list(weights), weights, [None, None, None])
    sources, _ = made.draw(99_000_000, 99_010_000)  # written out to there it would take minutes
    assert abs(int((sources == 0).sum()) - 3_000) <= 2


@FEW
@given(weights=weights_of, length=st.integers(1, 3000))
def test_every_prefix_is_within_one_sample(weights, length):
    names = [f"s{number}" for number in range(len(weights))]
    whole = whole_weights(dict(zip(names, weights)))
    total = sum(Fraction(repr(weight)) for weight in weights)
    assert all(Fraction(whole[n], sum(whole.values())) == Fraction(repr(w)) / total for n, w in zip(names, weights))
    sources, draws = Interleave(names, whole, [None] * len(names)).draw(0, length)
    counts = np.cumsum(sources[:, None] == np.arange(len(names)), axis=0)
    period = sum(whole.values())
    share = np.array([whole[name] for name in names], dtype=np.int64)
    positions = np.arange(1, length + 1)[:, None]
    assert (np.abs(counts * period - positions * share) < period).all()
    for number in range(len(names)):
        assert draws[sources == number].tolist() == list(range(counts[-1, number]))


@FEW
@given(weights=weights_of, start=st.integers(0, 10**12), cap=st.integers(1, 400), at=st.integers(0, 900))
def test_any_position_can_be_started_from(weights, start, cap, at):
    names = [f"s{number}" for number in range(len(weights))]
    whole = whole_weights(dict(zip(names, weights)))
    free = Interleave(names, whole, [None] * len(names))
    sources, draws = free.draw(start, start + 200)
    again = Interleave(names, whole, [None] * len(names)).draw(start + 50, start + 200)
    assert np.array_equal(sources[50:], again[0])
    assert np.array_equal(draws[50:], again[1])
    capped = Interleave(names, whole, [cap] * len(names))
    assert capped.total == cap * len(names)
    sources, draws = capped.draw(0, capped.total + 10)
    assert np.bincount(sources, minlength=len(names)).tolist() == [cap] * len(names)
    again = Interleave(names, whole, [cap] * len(names)).draw(at, at + 100)
    assert np.array_equal(sources[at : at + 100], again[0])
    assert np.array_equal(draws[at : at + 100], again[1])


@FEW
@given(
    lengths=st.lists(st.integers(1, 512), min_size=1, max_size=300),
    limit=st.one_of(st.none(), st.integers(200, 600)),
)
def test_packs_hold_every_sample_once_within_the_limits(lengths, limit):
    sizes = np.array(lengths)
    visual = sizes // 3
    packs = pack_best_fit(sizes, 512, visual, limit)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(sizes[pack].sum() <= 512 for pack in packs)
    assert limit is None or all(visual[pack].sum() <= limit for pack in packs)
    if limit is None:  # never two packs that would fit into one
        loads = sorted(int(sizes[pack].sum()) for pack in packs)
        assert len(loads) < 2 or loads[0] + loads[1] > 512


def realistic_lengths(count: int, longest: int, seed: int = 0) -> np.ndarray:
    """Captions with one image, documents, and samples with several images, in tokens."""
    random = np.random.default_rng(seed)
    image_tokens = random.choice([64, 100, 144, 256], count)
    captions = random.lognormal(4.0, 0.6, count) + image_tokens
    documents = random.lognormal(6.8, 0.8, count)
    several = random.integers(2, 8, count) * image_tokens + random.lognormal(5.5, 0.5, count)
    kind = random.random(count)
    return np.where(kind < 0.6, captions, np.where(kind < 0.85, documents, several)).astype(int).clip(20, longest)


@pytest.mark.parametrize(("length", "fill"), [(2048, 0.9965), (8192, 0.999), (32_768, 0.9995)])
@pytest.mark.parametrize("seed", [0, 1])
def test_fill_of_a_realistic_mixture(length, fill, seed):
    window = default_window(length)
    lengths = realistic_lengths(6 * window, length, seed)
    at, tokens, packs = 0, 0, 0
    while at + lookahead(window) <= len(lengths):
        count, made = pack_window(lengths[at : at + lookahead(window)], length, window)
        tokens += int(lengths[at : at + count].sum())
        at, packs = at + count, packs + len(made)
    assert tokens / (packs * length) >= fill


@FEW
@given(
    ranks=st.integers(1, 8),
    share=st.integers(1, 16),
    seed=st.integers(0, 1000),
)
def test_dealing_is_even_and_no_worse_than_in_order(ranks, share, seed):
    costs = np.random.default_rng(seed).lognormal(0, 0.6, ranks * share).tolist()
    hands = deal(costs, ranks)
    assert sorted(pack for hand in hands for pack in hand) == list(range(len(costs)))
    assert {len(hand) for hand in hands} == {share}
    assert max_over_mean(costs, hands) <= max_over_mean(costs, deal_in_order(costs, ranks)) + 0.35


@FEW
@given(ranks=st.integers(2, 6), share=st.integers(1, 6), seed=st.integers(0, 10**6), grain=st.sampled_from([0.001, 0.5]))
def test_dealing_is_longest_first_and_then_the_best_exchanges(ranks, share, seed, grain):
    """Against the rule written out, ties included."""
    costs = (np.round(np.random.default_rng(seed).lognormal(0, 0.6, ranks * share) / grain) * grain).tolist()
    loads, hands = [0.0] * ranks, [[] for _ in range(ranks)]
    for pack in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = min((r for r in range(ranks) if len(hands[r]) < share), key=lambda r: (loads[r], r))
        hands[rank].append(pack)
        loads[rank] += costs[pack]
    for _ in range(2 * ranks):
        slow = max(range(ranks), key=lambda r: (loads[r], -r))
        best, found = loads[slow] * (1 - 1e-9), None
        for rank in (r for r in range(ranks) if r != slow):
            for mine in range(share):
                for theirs in range(share):
                    moved = costs[hands[slow][mine]] - costs[hands[rank][theirs]]
                    if max(loads[slow] - moved, loads[rank] + moved) < best:
                        best, found = max(loads[slow] - moved, loads[rank] + moved), (rank, mine, theirs, moved)
        if found is None:
            break
        rank, mine, theirs, moved = found
        hands[slow][mine], hands[rank][theirs] = hands[rank][theirs], hands[slow][mine]
        loads[slow], loads[rank] = loads[slow] - moved, loads[rank] + moved
    assert deal(costs, ranks) == [sorted(hand) for hand in hands]


def test_ranks_are_compared_with_the_slowest_whatever_number_at_a_time(monkeypatch):
    cases = [np.random.default_rng(seed).lognormal(0, 1, 30).tolist() for seed in range(30)]
    hands = [deal(costs, 10) for costs in cases]
    monkeypatch.setattr(balance, "COMPARED_TOGETHER", 27)  # three ranks of three packs
    assert [deal(costs, 10) for costs in cases] == hands


def test_dealing_saves_time_on_average():
    random = np.random.default_rng(1)
    dealt, plain = [], []
    for _ in range(50):
        costs = random.lognormal(0, 0.4, 64).tolist()
        dealt.append(max_over_mean(costs, deal(costs, 8)))
        plain.append(max_over_mean(costs, deal_in_order(costs, 8)))
    assert np.mean(dealt) < 1.01
    assert np.mean(plain) > 1.15


def test_cost_model_of_the_7b_shape():
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18_944, "vocab_size": 152_064}  # fmt: skip
    vision = {"hidden_size": 1280, "depth": 32, "intermediate_size": 3420, "num_heads": 16}
    found = cost_model(Qwen25VL.shape({"text_config": text, "vision_config": vision}))
    assert found.per_token == pytest.approx(CostModel().per_token, rel=0.02)
    assert found.per_row == pytest.approx(CostModel().per_row, rel=0.05)


def test_the_tower_of_qwen2_vl_counts_with_its_own_width():
    """Its `hidden_size` is the language model's: 10.5 times too much was counted with it."""
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18_944, "vocab_size": 152_064}  # fmt: skip
    vision = {"hidden_size": 3584, "embed_dim": 1280, "mlp_ratio": 4, "depth": 32, "num_heads": 16}
    assert cost_model(Qwen2VL.shape({"text_config": text, "vision_config": vision})).per_row == pytest.approx(0.71e9, rel=0.05)
