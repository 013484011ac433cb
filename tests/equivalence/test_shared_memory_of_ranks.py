"""What ranks keep once between them: gradients that are reduced at every pack, and a second model that never trains."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from packs import pack_segments, segment, tiny_model, tiny_recipe
from processes import run_ranks
from ranks import losses, stage_dir, train_stages
from thread_ranks import run_threads

from terrace.models.weights import Directory
from terrace.recipe.schema import Recipe
from terrace.train.checkpoint_index import joined_index


def context_of(rank: int, ranks: int) -> Any:
    from terrace.worker.context import WorkerContext

    return WorkerContext(rank=rank, world_size=ranks, local_rank=rank)


def strategy_of(recipe: Recipe, rank: int, ranks: int) -> Any:
    from terrace.models.build import model_config
    from terrace.objectives.lm import summed_loss
    from terrace.train.setup import prepare_strategy

    loss = partial(summed_loss, chunk_tokens=64)
    return prepare_strategy(recipe.model, recipe.stages[0], model_config(recipe.model), context_of(rank, ranks), loss)


def batch_of(seed: int, precision: str = "fp32") -> Any:
    """A pack with a picture, or of text alone."""
    from terrace.models.batch import to_device
    from terrace.models.precision import DTYPES

    random = np.random.default_rng(seed)
    return to_device(pack_segments(seed, [segment(random, 20, [(2, 2)] if seed % 2 else [])]), "cpu", DTYPES[precision])


# ---------------------------------------------------------------- gradients


def test_on_one_worker_reducing_at_every_pack_changes_no_bit(tmp_path):
    found = {}
    for every_pack in (False, True):
        recipe = tiny_recipe(budget={"steps": 3}, parallel={"strategy": "fsdp", "reduce_every_pack": every_pack})
        folder = tmp_path / str(every_pack)
        train_stages(0, 1, recipe.model_dump(mode="json"), str(folder))
        final = Directory(stage_dir(folder, 0) / "final")
        found[every_pack] = losses(folder), {name: final.read(name) for name in final.names}
    assert found[False][0] == found[True][0]
    assert all(torch.equal(tensor, found[True][1][name]) for name, tensor in found[False][1].items())


@pytest.mark.parametrize("every_pack", [False, True])
def test_gradients_are_there_before_the_last_pack_where_each_is_reduced(every_pack):
    recipe = tiny_recipe(parallel={"strategy": "fsdp", "reduce_every_pack": every_pack})
    strategy = strategy_of(recipe, 0, 1)
    for last in (False, True):
        strategy.accumulate(batch_of(1), 1e-2, last=last)
        assert any(parameter.grad is not None for parameter in strategy._parameters.values()) == (every_pack or last)


def test_replicas_of_a_hybrid_strategy_write_each_number_once():
    recipe = tiny_recipe(parallel={"strategy": "fsdp", "hybrid_shard_size": 2})

    def written(rank: int, ranks: int) -> Any:
        shards = strategy_of(recipe, rank, ranks).shards("weights")
        return {"weights": {shard.name: (list(shard.shape), shard.start, len(shard.values)) for shard in shards}}

    found = run_threads(4, written)
    assert all(found)
    index, faults = joined_index(enumerate(found))
    assert faults == []
    assert {rank for placed in index["weights"].values() for rank in placed.ranks} == {0, 1, 2, 3}


def gradients(rank: int, ranks: int, hybrid: int | None) -> dict[bool, dict[str, np.ndarray]]:
    """This rank's parts of the gradients of three packs, reduced once and at every pack."""
    found = {}
    for every_pack in (False, True):
        recipe = tiny_recipe(parallel={"strategy": "fsdp", "reduce_every_pack": every_pack, "hybrid_shard_size": hybrid})
        strategy = strategy_of(recipe, rank, ranks)
        for number in range(3):
            strategy.accumulate(batch_of(10 * rank + number), 1e-2, last=number == 2)
        held = ((name, parameter.grad) for name, parameter in strategy._parameters.items())
        found[every_pack] = {name: gradient.to_local().numpy() for name, gradient in held if gradient is not None}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", [None, 2])
def test_gradients_reduced_at_every_pack_are_those_reduced_once(hybrid):
    """Three packs of each of four ranks; in groups of two that replicate, the groups exchange theirs at the last pack alone."""
    by_rank = run_ranks(4, gradients, hybrid, timeout=300)
    for found in by_rank:
        assert found[False].keys() == found[True].keys()
        for name, gradient in found[False].items():
            np.testing.assert_allclose(found[True][name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)
    assert sum(float(np.abs(gradient).sum()) for gradient in by_rank[0][True].values()) > 0


@pytest.mark.parametrize(("asked", "usable", "expected"), [
    (None, [1e15, 1e15], False), (None, [1e15, 1.0], True), (False, [1.0, 1.0], False), (True, [1e15, 1e15], True),
])  # fmt: skip
def test_ranks_agree_on_when_gradients_are_reduced(caplog, asked, usable, expected):
    """The smallest device decides for all, unless the recipe does; more than once a step is said in the log, by rank 0."""
    from terrace.models.build import model_config
    from terrace.train import settled

    recipe = tiny_recipe(batch={"packs": 8}, parallel={"strategy": "fsdp", "reduce_every_pack": asked})
    config = model_config(recipe.model)
    with mock.patch.object(settled, "_usable_bytes", lambda context, margin: usable[context.rank]), caplog.at_level(logging.INFO):
        found = run_threads(2, lambda rank, ranks: settled.settle(recipe, recipe.stages[0], config, context_of(rank, ranks)))
    assert [bool(stage.parallel.reduce_every_pack) for stage in found] == [expected, expected]
    said = [record.getMessage() for record in caplog.records if "reduced at every pack" in record.getMessage()]
    assert len(said) == expected


@pytest.mark.parametrize(("asked", "usable", "expected"), [
    (None, [1e15, 1e15], False), (None, [1e15, 1.0], True), (False, [1.0, 1.0], False), (True, [1e15, 1e15], True),
])  # fmt: skip
def test_ranks_agree_on_whether_the_copy_that_decodes_is_divided(caplog, tmp_path, asked, usable, expected):
    from rl_stage import rl_recipe

    from terrace.models.build import model_config
    from terrace.recipe.schema import Model
    from terrace.train import settled

    recipe = rl_recipe(tmp_path, 1, {"shard_copy": asked}, parallel={"strategy": "fsdp"})
    config = model_config(Model.model_validate(tiny_model()))
    with mock.patch.object(settled, "_usable_bytes", lambda context, margin: usable[context.rank]), caplog.at_level(logging.INFO):
        found = run_threads(2, lambda rank, ranks: settled.settle(recipe, recipe.stages[0], config, context_of(rank, ranks)))
    assert [stage.grpo.shard_copy for stage in found] == [expected, expected]
    said = [record.getMessage() for record in caplog.records if "the copy that decodes is divided" in record.getMessage()]
    assert len(said) == expected


def test_a_device_offers_what_the_margin_leaves():
    from terrace.train.settled import _usable_bytes

    card = SimpleNamespace(total_memory=100)
    with mock.patch("torch.cuda.get_device_properties", return_value=card):
        assert _usable_bytes(SimpleNamespace(device="cuda:0"), 0.25) == 75
    assert _usable_bytes(context_of(0, 1), 0.25) == float("inf")


# ---------------------------------------------------------------- a second model


def frozen_losses(rank: int, ranks: int, strategies: list[str], precision: str) -> dict[str, list[float]]:
    """Losses of a second model, of other weights than the first one's, on three packs; and the first's own, for comparison."""
    from terrace.models.attention import choose_backend, use_attention
    from terrace.models.build import meta_model, model_config
    from terrace.models.weights import initial_weights
    from terrace.objectives.lm import summed_loss

    found = {}
    for name in strategies:
        recipe = tiny_recipe(precision=precision, parallel={"strategy": name})
        strategy = strategy_of(recipe, rank, ranks)
        other = recipe.model.model_copy(update={"seed": recipe.model.seed + 1})
        for seed, model in ((0, recipe.model), (1, other)):
            skeleton = meta_model(model_config(model))
            source, _ = initial_weights(model, skeleton)
            use_attention(skeleton, choose_backend("auto", "cpu", precision)[0])
            of = strategy.frozen(skeleton, source, partial(summed_loss, chunk_tokens=64))
            batches = [batch_of(10 * rank + number, precision) for number in range(3)]
            found[f"{name}-{seed}"] = [float(of(batch)) for batch in batches]
            if seed == 0:
                found[f"{name}-own"] = [float(strategy.loss(batch)) for batch in batches]
    return found


def assert_like_whole(found: list[dict[str, list[float]]], names: list[str]) -> None:
    for of_rank in found:
        assert of_rank["ddp-0"] != of_rank["ddp-1"]
        for name in names:
            for seed in ("0", "1"):
                np.testing.assert_allclose(of_rank[f"{name}-{seed}"], of_rank[f"ddp-{seed}"], rtol=1e-6, err_msg=name)
            assert of_rank[f"{name}-0"] == of_rank[f"{name}-own"], "the same weights computed in the same way: their KL is 0"


def test_a_second_model_by_groups_says_what_a_whole_one_says():
    """One worker: gathered and freed again as on many."""
    assert_like_whole([frozen_losses(0, 1, ["ddp", "fsdp"], "fp32")], ["ddp", "fsdp"])


@pytest.mark.slow
def test_a_second_model_in_shards_says_what_a_whole_one_says():
    names = ["ddp", "fsdp", "zero2", "zero3"]
    assert_like_whole(run_ranks(2, frozen_losses, names, "fp32", timeout=400), names)


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [["ddp", "fsdp"], ["ddp", "zero3"]], ids=["fsdp", "zero3"])
def test_a_second_model_in_bf16_computes_as_the_first_does(strategies):
    for found in run_ranks(2, frozen_losses, strategies, "bf16", timeout=400):
        for name in strategies:
            assert found[f"{name}-0"] == found[f"{name}-own"], name
            np.testing.assert_allclose(found[f"{name}-1"], found["ddp-1"], rtol=2e-2, err_msg=name)


# ---------------------------------------------------------------- frozen weights


def frozen_masters(rank: int, ranks: int, strategies: list[str]) -> dict[str, tuple[int, int]]:
    """By strategy: bytes of float32 frozen weights on this rank's host, and of all of them, in a stage that trains the projector alone."""
    found = {}
    for name in strategies:
        recipe = tiny_recipe(precision="bf16", train={"projector": {"lr": 1e-3}}, parallel={"strategy": name})
        strategy = strategy_of(recipe, rank, ranks)
        frozen = {name: shape for name, shape in strategy._shapes.items() if name not in strategy._steps}
        assert strategy._frozen.keys() == frozen.keys()
        held = sum(shard.values.untyped_storage().nbytes() for shard in strategy._frozen.values())
        found[name] = held, sum(4 * int(np.prod(shape)) for shape in frozen.values())
    return found


@pytest.mark.slow
def test_frozen_weights_are_kept_in_float32_once_between_all_ranks():
    strategies = ["zero1", "zero2", "zero3"]
    found = run_ranks(2, frozen_masters, strategies, timeout=400)
    for name in strategies:
        held, whole = [of_rank[name][0] for of_rank in found], found[0][name][1]
        assert whole > 500_000
        assert whole <= sum(held) <= 1.001 * whole
        assert max(held) <= 0.501 * whole

