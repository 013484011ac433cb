"""Ring attention gives what attention over the whole pack gives, and ranks that share packs by it train as one rank does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import ring_ranks
import torch
from processes import run_ranks
from ranks import train_each, train_stages
from shared_packs import assert_same_run, recipe_of, values_of

from terrace.families.registry import built_in, family_class
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_model_named
from terrace.models.ring_attention import TILE_NUMBERS, Seen
from terrace.planner import memory


def case(tokens: int, ends: list[int], heads: int = 4, keys: int = 2, wide: int = 8, narrow: int = 8, window: int | None = None,
         tile: int = TILE_NUMBERS) -> dict:  # fmt: skip
    return {
        "tokens": tokens, "boundaries": [0, *ends], "heads": heads, "keys": keys, "wide": wide, "narrow": narrow, "window": window,
        "tile": tile, "scale": wide**-0.5,
    }  # fmt: skip


CASES = {
    "one segment over all ranks": case(60, [60]),
    "segments that cross, end at and lie within ranks": case(60, [7, 20, 20, 41, 60]),
    "a segment of each token": case(60, list(range(1, 61))),
    "one key head, five query heads, small tiles": case(60, [33, 60], heads=5, keys=1, tile=5 * 20 * 3),
    "narrow values": case(60, [50, 60], wide=12, narrow=4),
    "a window": case(60, [11, 60], window=9),
    "a window beyond a rank, small tiles": case(60, [60], window=31, tile=4 * 20 * 7),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "dtype", "tolerance"), [(2, "float32", 1e-6), (3, "float32", 1e-6), (5, "float32", 1e-6), (3, "bfloat16", 3e-2)]
)
def test_a_ring_gives_what_the_whole_pack_gives(ranks: int, dtype: str, tolerance: float):
    run_ranks(ranks, ring_ranks.compare, CASES, dtype, tolerance)


def test_tiles_have_every_pair_that_sees_each_other_once_and_no_other():
    generator = np.random.default_rng(0)
    for _ in range(20):
        ranks, tokens = int(generator.integers(1, 5)), int(generator.integers(1, 14))
        length = ranks * tokens
        ends = sorted({*generator.integers(1, length + 1, 3).tolist(), length})
        window = int(generator.integers(1, length + 1)) if generator.random() < 0.5 else None
        seen = Seen((0, *ends), tokens, window, (int(generator.integers(1, 6)), int(generator.integers(1, 6))))
        met = np.zeros((length, length), int)
        for rank, other in itertools.product(range(ranks), repeat=2):
            for rows, columns, whole in seen.tiles(rank, other):
                visible = np.ones((rows.stop - rows.start, columns.stop - columns.start), bool)
                if not whole:
                    visible = ~seen.hidden(rank, other, rows, columns, torch.device("cpu")).numpy()
                place = np.ix_(np.arange(rows.start, rows.stop) + rank * tokens, np.arange(columns.start, columns.stop) + other * tokens)
                met[place] += visible
        numbers, segment = np.arange(length), np.searchsorted(ends, np.arange(length), side="right")
        expected = (segment[:, None] == segment[None]) & (numbers[:, None] >= numbers[None])
        if window is not None:
            expected &= numbers[:, None] - numbers[None] < window
        np.testing.assert_array_equal(met, expected)


def test_every_family_whose_tokens_look_ahead_says_so():
    for name in built_in():
        groups = type(family_model_named(name)).groups is not FamilyModel.groups
        assert family_class(name).looks_ahead == groups, name


def test_the_plan_counts_with_the_tiles_that_there_are():
    assert memory.RING_TILE_NUMBERS == TILE_NUMBERS


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    train_stages(0, 1, values_of(recipe_of("ddp", 1)), str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategies"), [(2, ["ddp", "fsdp", "zero1", "zero2", "zero3"]), (3, ["ddp", "fsdp", "zero3"])])
def test_ranks_that_share_packs_by_a_ring_equal_one(ranks, strategies, tmp_path, reference):
    """Three ranks: more than two, and a number that divides neither the 4 heads nor the 2 key/value heads."""
    recipes = {}
    for strategy in strategies:
        recipe = recipe_of(strategy, ranks, parallel={"strategy": strategy, "sequence_parallel": ranks, "sequence_exchange": "ring"})
        recipes[strategy] = values_of(recipe)
    run_ranks(ranks, train_each, recipes, str(tmp_path), timeout=400)
    for name in recipes:
        assert_same_run(tmp_path / name, reference)
