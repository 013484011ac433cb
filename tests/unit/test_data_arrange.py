"""Packs and steps as fair draws of the mixture: nothing lost, as full as before, no sample twice, every kind in every step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.data.order.arrange import pack_mixed, repeats_apart, spread_packs
from terrace.data.order.balance import CostModel
from terrace.data.order.items import Items
from terrace.data.order.packing import pack_best_fit
from terrace.data.order.plan import StagePlan
from terrace.recipe.schema import Stage


class Lengths:
    """A source that is nothing but lengths."""

    def __init__(self, name: str, typical: int, spread: float, count: int):
        drawn = np.exp(np.random.default_rng(len(name)).normal(np.log(typical), spread, count))
        self.name, self.count, self.changes, self.mark = name, count, {}, name
        self.lengths = np.clip(drawn, 16, 8_000).astype(np.int64)
        self.mean_tokens = float(self.lengths.mean())

    def take(self, numbers: np.ndarray) -> Items:
        nothing = np.zeros(len(numbers), np.int64)
        return Items(numbers.astype(np.int64), self.lengths[numbers], nothing, nothing, nothing, nothing, nothing - 1)

    def id_of(self, row: int) -> str:
        return f"{self.name}-{row}"


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), sizes=st.lists(st.integers(1, 100), min_size=1, max_size=80), kinds=st.integers(1, 90),
    limit=st.sampled_from([None, 40]),
)  # fmt: skip
def test_every_sample_lies_in_one_pack_that_has_room(data, sizes, kinds, limit) -> None:
    lengths = np.asarray(sizes)
    keys = np.asarray(data.draw(st.lists(st.integers(0, kinds), min_size=len(sizes), max_size=len(sizes))))
    visual = np.minimum(lengths, 40) if limit else None
    best = pack_best_fit(lengths, 100, visual, limit)
    packs = pack_mixed(lengths, keys, len(best), 100, visual, limit)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(sizes)))
    assert all(lengths[pack].sum() <= 100 for pack in packs)
    if limit:
        assert all(visual[pack].sum() <= limit for pack in packs)


@given(weights=st.lists(st.floats(0, 9), min_size=1, max_size=60), start=st.floats(0, 1, exclude_max=True))
def test_spread_packs_are_a_permutation_and_every_run_covers_the_range(weights, start) -> None:
    order = spread_packs(weights, start)
    assert sorted(order) == list(range(len(weights)))
    place = np.argsort(np.argsort(weights, kind="stable"), kind="stable")
    for first in range(0, len(order) - 8, 8):
        ranks = sorted(place[order[first : first + 8]] / len(order))
        assert ranks[0] < 0.34
        assert ranks[-1] > 0.66


def test_repeats_are_exchanged_into_other_steps() -> None:
    held = [{0}, {0}, {1}, {2}, {3}, {4}]
    assert repeats_apart([0, 1, 2, 3, 4, 5], held, 0, 2) == [2, 1, 0, 3, 4, 5]
    assert repeats_apart([0, 1, 2, 3, 4, 5], held, 1, 2) == [0, 1, 2, 3, 4, 5]  # the first pack is the end of another step
    assert repeats_apart([0, 1], held, 0, 2) == [0, 1]  # it cannot be helped


@pytest.mark.parametrize("batch", [16, 64])
def test_steps_are_fair_draws_of_the_mixture(batch: int) -> None:
    sources = {"captions": Lengths("captions", 180, 0.5, 20_000), "qa": Lengths("qa", 350, 0.6, 8_000),
               "documents": Lengths("documents", 2_500, 0.7, 3_000), "grounding": Lengths("grounding", 420, 0.3, 200)}  # fmt: skip
    stage = Stage.model_validate(
        {"name": "s", "train": {"language": {"lr": 1e-4}}, "mixture": {"captions": 5, "qa": 3, "documents": 1, "grounding": 1},
         "sequence_length": 8_192, "pixels": {"min": 784, "max": 50_000}, "budget": {"steps": 2_000 // batch}, "batch": {"packs": batch}}
    )  # fmt: skip
    shares, fills, twice = [], [], Counter()
    for _, packs in StagePlan(stage, sources, 0, CostModel()).steps():
        fills += [sum(pack.lengths) / 8_192 for pack in packs]
        refs = Counter(ref for pack in packs for ref in pack.samples)
        twice["in a pack"] += sum(len(pack.samples) - len(set(pack.samples)) for pack in packs)
        twice["in a step"] += sum(refs.values()) - len(refs)
        kinds = Counter(ref.source for ref in refs.elements())
        shares.append([kinds[name] / sum(kinds.values()) for name in sources])
    assert np.mean(fills) > 0.999
    assert np.allclose(np.mean(shares, axis=0), [0.5, 0.3, 0.1, 0.1], atol=0.01)
    assert np.std(shares, axis=0).max() < 0.16 / batch**0.5
    assert twice["in a pack"] == 0
    assert twice["in a step"] < (10 if batch == 16 else 400)
