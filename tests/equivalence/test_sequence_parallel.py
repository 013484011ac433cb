"""Ranks that share a pack give the losses and the weights of one rank that has it alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packs import IMAGE_PAD, VIDEO_PAD, random_pack, tiny_recipe
from processes import run_ranks
from ranks import losses, train_each, train_stages
from shared_packs import assert_same_run, recipe_of, values_of

from terrace.errors import InputError
from terrace.models.build import meta_model, model_config
from terrace.models.sequence_parallel import (
    SequenceGroup,
    check_heads,
    image_shares,
    open_sequence_group,
    padded_length,
    shard_to_device,
    use_sequence_parallel,
)
from terrace.worker.context import WorkerContext, data_place


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    train_stages(0, 1, values_of(recipe_of("ddp", 1)), str(folder))
    return folder


def test_two_ranks_that_share_packs_equal_one(tmp_path, reference):
    recipes = {strategy: values_of(recipe_of(strategy, 2)) for strategy in ("ddp", "fsdp")}
    ring = {"strategy": "ddp", "sequence_parallel": 2, "sequence_exchange": "ring"}
    recipes["ring"] = values_of(recipe_of("ddp", 2, parallel=ring))
    run_ranks(2, train_each, recipes, str(tmp_path))
    for name in recipes:
        assert_same_run(tmp_path / name, reference)


@pytest.mark.slow
def test_sharing_under_zero_equals_one_rank(tmp_path, reference):
    recipes = {strategy: values_of(recipe_of(strategy, 2)) for strategy in ("zero1", "zero2", "zero3")}
    run_ranks(2, train_each, recipes, str(tmp_path), timeout=400)
    for name in recipes:
        assert_same_run(tmp_path / name, reference)


@pytest.mark.slow
def test_groups_of_two_beside_each_other_and_one_group_of_four(tmp_path, reference):
    """Four ranks: two packs at a time shared by two each, or one shared by four (more ranks than key/value heads)."""
    recipes = {f"{strategy}-{size}": values_of(recipe_of(strategy, size)) for strategy in ("ddp", "fsdp") for size in (2, 4)}
    run_ranks(4, train_each, recipes, str(tmp_path), timeout=400)
    for name in recipes:
        assert_same_run(tmp_path / name, reference)


@pytest.mark.slow
def test_bf16_stays_close(tmp_path, reference):
    recipes = {strategy: values_of(recipe_of(strategy, 2, precision="bf16")) for strategy in ("ddp", "fsdp")}
    run_ranks(2, train_each, recipes, str(tmp_path))
    for name in recipes:
        for index in (0, 1):
            np.testing.assert_allclose(losses(tmp_path / name, index), losses(reference, index), rtol=2e-2)


# ---------------------------------------------------------------- the pack's parts, in one process


def shards(pack, size):
    groups = [SequenceGroup(None, rank, size) for rank in range(size)]
    return [shard_to_device(pack, (IMAGE_PAD, VIDEO_PAD), "cpu", torch.float32, group) for group in groups]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_token_target_and_image_is_on_one_rank(size):
    pack = random_pack(3, segments=5)
    parts = shards(pack, size)
    length = padded_length(pack.tokens, size)
    ids = torch.cat([part.input_ids[0] for part in parts])
    assert len(ids) == length
    assert ids[: pack.tokens].tolist() == pack.input_ids.tolist()
    assert not {IMAGE_PAD, VIDEO_PAD} & set(ids[pack.tokens :].tolist())
    positions = torch.cat([part.position_ids[:, 0] for part in parts], dim=1)
    assert positions[:, : pack.tokens].tolist() == pack.position_ids.tolist()
    rows = [row + rank * length // size for rank, part in enumerate(parts) for row in part.supervised_rows.tolist()]
    assert rows == np.flatnonzero(pack.targets >= 0).tolist()
    assert torch.cat([part.targets for part in parts]).tolist() == pack.targets[pack.targets >= 0].tolist()
    grids = [grid for part in parts if part.image_facts is not None for grid in part.image_facts.facts.tolist()]
    assert grids == pack.image_facts.tolist()
    assert sum(len(part.pixels) for part in parts if part.pixels is not None) == len(pack.pixels)
    shard = parts[-1].sequence
    assert sum(shard.visual_computed) == len(pack.pixels) // 4
    assert shard.visual_before + shard.visual_own == len(pack.pixels) // 4
    for part in parts:  # attention runs over the whole pack on every rank
        assert part.boundaries[-1] == length
        assert part.boundaries[: len(pack.segment_ends) + 1] == [0, *pack.segment_ends.tolist()]


def test_a_pack_without_tokens_or_images_still_gives_every_rank_one_token():
    from terrace.objectives.lm import empty_pack

    for part in shards(empty_pack(), 3):
        assert part.input_ids.shape == (1, 1)
        assert part.pixels is None
        assert len(part.targets) == 0


def test_images_are_cut_where_their_patches_are_halved():
    assert image_shares([100, 10, 10, 80], 2) == [0, 1, 4]
    assert image_shares([400], 2) in ([0, 0, 1], [0, 1, 1])
    assert image_shares([], 3) == [0, 0, 0, 0]


def test_heads_that_cannot_be_dealt_are_refused():
    text = SimpleNamespace(num_attention_heads=12, num_key_value_heads=4)
    for size in (2, 4, 12):
        check_heads(text, size)
    for size in (3, 5, 6, 8):
        with pytest.raises(InputError, match="12 attention heads and 4 key/value heads"):
            check_heads(text, size)


def test_the_skeleton_refuses_heads_that_the_recipe_could_not_know():
    skeleton = meta_model(model_config(tiny_recipe().model))
    with pytest.raises(InputError, match="cannot be dealt evenly to 3 ranks"):
        use_sequence_parallel(skeleton, "sdpa_segments", 3)


def test_ranks_form_groups_of_neighbours():
    places = [data_place(WorkerContext(rank=rank, world_size=6), 3) for rank in range(6)]
    assert places == [(0, 2)] * 3 + [(1, 2)] * 3
    with pytest.raises(InputError, match="sequence_parallel 4"):
        data_place(WorkerContext(rank=0, world_size=6), 4)
    with pytest.raises(InputError, match="sequence_parallel 4"):
        open_sequence_group(4, 0, 6)
    assert open_sequence_group(1, 0, 6) is None
