"""Every strategy gives the same curve and the same weights as one process, and continues what any other saved."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from packs import tiny_recipe
from processes import run_ranks
from ranks import (
    continue_copies,
    losses,
    stage_dir,
    train_each,
    train_stages,
    train_with_a_poisoned_pack,
    train_with_loss_scale,
)
from traced import continue_traced, train_each_traced

from terrace.models.weights import Directory
from terrace.recipe.schema import Recipe

STRATEGIES = ["fsdp", "zero1", "zero2", "zero3"]
COMPILED = ["ddp", "fsdp", "zero1", "zero2"]


def two_stages(strategy: str, precision: str = "fp32", **changes):
    """A run that crosses a freeze/unfreeze boundary; in every second step one of two ranks has no image."""
    common = {
        "parallel": {"strategy": strategy}, "precision": precision, "checkpoint": {"every_steps": 2, "keep_last": 9},
        "optimizer": {"clip": 1.0}, **changes,
    }
    layered = {"vision": {"lr": 1e-3, "layer_decay": 0.9}, "language": {"lr": 5e-4}}
    layered["projector"] = {"lr": 1e-3, "optimizer_state": "keep"}
    layered["language"]["activation_checkpointing"] = True
    return tiny_recipe([
        {"name": "warm", "train": {"projector": {"lr": 1e-3}}, "budget": {"steps": 3}, **common},
        {"name": "all", "train": layered, "budget": {"steps": 7}, **common},
    ])


def weights(folder):
    directory = Directory(folder / "final")
    return {name: directory.read(name) for name in sorted(directory.names)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, DDP (no wrapper), float32."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("reference")
    train_stages(0, 1, two_stages("ddp").model_dump(mode="json"), str(folder))
    return folder


def assert_same_run(folder, reference, rtol: float, weight_tolerance: float) -> None:
    for index in (0, 1):
        np.testing.assert_allclose(losses(folder, index), losses(reference, index), rtol=rtol)
    ours, theirs = weights(stage_dir(folder, 1)), weights(stage_dir(reference, 1))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) < weight_tolerance, name


def test_two_ranks_of_any_strategy_equal_one_process(tmp_path, reference):
    recipes = {name: two_stages(name).model_dump(mode="json") for name in ("ddp", *STRATEGIES)}
    every_pack = {"strategy": "fsdp", "reduce_every_pack": True}
    recipes["fsdp-every-pack"] = two_stages("fsdp", parallel=every_pack).model_dump(mode="json")
    run_ranks(2, train_each, recipes, str(tmp_path), timeout=600)
    for name in recipes:
        assert_same_run(tmp_path / name, reference, 1e-5, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_under_every_strategy_equal_one_process(tmp_path, reference):
    """Through a freeze boundary, with recomputed blocks and a rank without pictures; killed, and continued with and without."""
    compiled = {name: {"parallel": {"strategy": name, "compile": True}} for name in COMPILED}
    recipes = {name: two_stages(name, **changes).model_dump(mode="json") for name, changes in compiled.items()}
    [counts, _] = run_ranks(2, train_each_traced, recipes, str(tmp_path), timeout=800)
    assert 0 < counts[0] <= 24
    for name in recipes:
        assert_same_run(tmp_path / name, reference, 1e-5, 1e-4)
    saved = cut_back(shutil.copytree(tmp_path / "ddp", tmp_path / "saved"), 4)
    others = {"compiled": recipes["ddp"], "plain": two_stages("fsdp").model_dump(mode="json")}
    run_ranks(2, continue_traced, others, str(saved), str(tmp_path / "continued"), timeout=400)
    assert_same_run(tmp_path / "continued" / "compiled", tmp_path / "ddp", 1e-6, 1e-6)
    assert_same_run(tmp_path / "continued" / "plain", reference, 1e-5, 1e-4)


@pytest.mark.slow
def test_bf16_stays_close(tmp_path, reference):
    recipes = {name: two_stages(name, "bf16").model_dump(mode="json") for name in ("ddp", *STRATEGIES)}
    run_ranks(2, train_each, recipes, str(tmp_path), timeout=600)
    for name in recipes:
        for index in (0, 1):
            np.testing.assert_allclose(losses(tmp_path / name, index), losses(reference, index), rtol=2e-2, err_msg=name)


OFFLOADS = {
    "ddp-activations": {"activation_offload": True},
    "fsdp-activations": {"activation_offload": True, "parallel": {"strategy": "fsdp"}},
    "fsdp-parameters": {"parallel": {"strategy": "fsdp", "offload_parameters": "cpu"}},
    "zero2-optimizer": {"parallel": {"strategy": "zero2", "offload_optimizer": "cpu"}},
    "zero3-everything": {
        "parallel": {"strategy": "zero3", "offload_optimizer": "cpu", "offload_parameters": "cpu"}, "activation_offload": True,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("names", [list(OFFLOADS)[:3], list(OFFLOADS)[3:]], ids=["torch", "deepspeed"])
def test_offloading_to_the_host_changes_no_number(tmp_path, reference, names):
    recipes = {name: two_stages("ddp", **OFFLOADS[name]).model_dump(mode="json") for name in names}
    run_ranks(2, train_each, recipes, str(tmp_path), timeout=500)
    for name in names:
        assert_same_run(tmp_path / name, reference, 1e-5, 1e-4)


def cut_back(run_dir, step: int):
    """A run whose second stage stopped after `step` steps; its last 7 - step losses are still to come."""
    folder = stage_dir(run_dir, 1)
    (folder / "result.json").unlink()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return run_dir


@pytest.fixture(scope="module")
def saved_runs(tmp_path_factory):
    """Runs cut back to step 2 of 7, made once per strategy and number of ranks."""
    made = {}

    def get(strategy: str, world_size: int):
        if (strategy, world_size) not in made:
            folder = tmp_path_factory.mktemp(f"{strategy}-{world_size}")
            run_ranks(world_size, train_stages, two_stages(strategy).model_dump(mode="json"), str(folder), timeout=400)
            made[strategy, world_size] = cut_back(folder, 2)
        return made[strategy, world_size]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("loaded_by", [1, 2])
@pytest.mark.parametrize("saved_by", [1, 2])
@pytest.mark.parametrize("saved", ["ddp", *STRATEGIES])
def test_what_one_strategy_saved_any_other_continues(tmp_path, reference, saved_runs, saved, saved_by, loaded_by):
    """Saved after 2 of 7 steps by one or two ranks; the next 5 under every strategy on one or two ranks agree."""
    recipes = {loaded: two_stages(loaded).model_dump(mode="json") for loaded in ("ddp", *STRATEGIES)}
    run_ranks(loaded_by, continue_copies, recipes, str(saved_runs(saved, saved_by)), str(tmp_path), timeout=500)
    for loaded in recipes:
        assert_same_run(tmp_path / loaded, reference, 1e-5, 1e-4)


def test_a_checkpoint_crosses_strategies_and_numbers_of_ranks(tmp_path, reference):
    """Two of the hundred crossings above: ddp on one rank -> fsdp on two -> ddp on one again."""
    saved = cut_back(shutil.copytree(reference, tmp_path / "saved"), 2)
    run_ranks(2, continue_copies, {"fsdp": two_stages("fsdp").model_dump(mode="json")}, str(saved), str(tmp_path))
    assert_same_run(tmp_path / "fsdp", reference, 1e-5, 1e-4)
    back = cut_back(tmp_path / "fsdp", 4)
    train_stages(0, 1, two_stages("ddp").model_dump(mode="json"), str(back), first=1)
    assert_same_run(back, reference, 1e-5, 1e-4)


def largest_change_of_a_start_weight(rank: int, world_size: int, recipes: dict[str, dict]) -> dict[str, float]:
    """Per recipe, between the float32 weights that a strategy is given and those it holds before the first step."""
    from terrace.models.build import build_model, model_config
    from terrace.objectives.lm import summed_loss
    from terrace.train.setup import prepare_strategy
    from terrace.worker.context import WorkerContext

    changes, context = {}, WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    for name, values in recipes.items():
        recipe = Recipe.model_validate(values)
        config = model_config(recipe.model)
        given = dict(build_model(recipe.model, config).named_parameters())
        strategy = prepare_strategy(recipe.model, recipe.stages[0], config, context, partial(summed_loss, chunk_tokens=64))
        changes[name] = max(float((tensor - given[key]).abs().max()) for key, tensor in strategy.tensors("weights"))
    return changes


def test_no_strategy_rounds_the_weights_it_starts_from():
    """In bf16 as well: a stage would otherwise lose what the one before it learnt in small steps."""
    recipes = {
        name: tiny_recipe(precision="bf16", parallel={"strategy": name}).model_dump(mode="json") for name in ("ddp", *STRATEGIES)
    }
    assert run_ranks(2, largest_change_of_a_start_weight, recipes) == [dict.fromkeys(recipes, 0.0)] * 2


def most_held_while_loading(rank: int, world_size: int, values: dict) -> float:
    """The largest share of the model's parameters that a rank held whole while the strategy was being made."""
    from unittest import mock

    import terrace.train.setup as setup
    from terrace.models.build import model_config
    from terrace.objectives.lm import summed_loss
    from terrace.worker.context import WorkerContext

    recipe, real, shares = Recipe.model_validate(values), setup.initial_weights, []

    def watched(model, skeleton, *rest):
        source, report = real(model, skeleton, *rest)
        total = sum(parameter.numel() for parameter in skeleton.parameters())

        def read(name):
            shares.append(sum(p.numel() for p in skeleton.parameters() if not p.is_meta) / total)
            return source(name)

        return read, report

    context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    with mock.patch.object(setup, "initial_weights", watched):
        setup.prepare_strategy(recipe.model, recipe.stages[0], model_config(recipe.model), context, partial(summed_loss, chunk_tokens=64))
    return max(shares)


@pytest.mark.slow
def test_zero3_never_holds_the_whole_model():
    """Two ranks; embeddings, output layer and a block are each a sixth of this model. zero1 holds all of it."""
    held = {
        name: run_ranks(2, most_held_while_loading, tiny_recipe(parallel={"strategy": name}).model_dump(mode="json"))
        for name in ("zero1", "zero3")
    }
    assert max(held["zero3"]) < 0.3
    assert min(held["zero1"]) == 1.0


@pytest.mark.slow
def test_a_skipped_step_leaves_no_trace_under_any_strategy(tmp_path):
    """The gradients of a batch with a loss that is not finite are dropped whole, however they are spread."""
    recipes = {
        name: tiny_recipe(
            budget={"steps": 4}, failure={"on_nonfinite": "skip"}, parallel={"strategy": name}
        ).model_dump(mode="json")
        for name in ("ddp", *STRATEGIES)
    }
    train_with_a_poisoned_pack(0, 1, {"ddp": recipes["ddp"]}, str(tmp_path / "one"))
    run_ranks(2, train_with_a_poisoned_pack, recipes, str(tmp_path / "two"), timeout=400)
    expected = losses(tmp_path / "one" / "ddp")
    assert expected[1] is None
    for name in recipes:
        found = losses(tmp_path / "two" / name)
        assert found[1] is None, name
        np.testing.assert_allclose(found[2:], expected[2:], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_fp16_recovers_from_an_overflow_alike_on_all_ranks(tmp_path):
    recipes = {
        name: tiny_recipe(budget={"steps": 8}, precision="fp16", parallel={"strategy": name}).model_dump(mode="json")
        for name in ("ddp", "fsdp")
    }
    alone = train_with_loss_scale(0, 1, recipes, str(tmp_path / "one"), 2.0**24)
    # Averaging over two ranks means that each scales its loss by two more: start from half to overflow at the same step.
    both = run_ranks(2, train_with_loss_scale, recipes, str(tmp_path / "two"), 2.0**23, timeout=300)
    assert both == [alone, alone]
    assert 0 < alone["ddp"] < 8
    for name in recipes:
        one, two = losses(tmp_path / "one" / name), losses(tmp_path / "two" / name)
        np.testing.assert_allclose(two, one, rtol=2e-3, err_msg=name)
