"""One stage end to end on packs in memory: the same numbers for one rank or two, resumed or not, frozen or not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from packs import ALL_PARTS, random_pack, tiny_recipe
from processes import run_ranks
from ranks import losses, memory_feed, packs_of_step, stage_dir, train, train_stages
from transformers import AutoModelForImageTextToText

from terrace.errors import InputError, Preempted
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.families.registry import family_model_named
from terrace.models.forward import pack_logits_hidden
from terrace.models.patch_products import as_products
from terrace.models.weights import Directory
from terrace.storage.run_storage import OnThisDisk
from terrace.train.restore import newest_complete
from terrace.train.setup import prepare_strategy
from terrace.train.step import NonFinite
from terrace.worker.context import WorkerContext

FAMILY = family_model_named("qwen2_5_vl")


def _weights(folder):
    directory = Directory(folder / "final")
    return {name: directory.read(name) for name in sorted(directory.names)}


def _run(tmp_path, recipe, **changes):
    return train_stages(0, 1, recipe.model_dump(mode="json"), str(tmp_path), **changes)


def test_a_stage_trains_writes_its_files_and_is_done(tmp_path):
    recipe = tiny_recipe(budget={"steps": 6}, checkpoint={"every_steps": 2, "keep_last": 2})
    result = _run(tmp_path, recipe)[0]
    folder = stage_dir(tmp_path, 0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    expected = sum(pack.supervised_tokens for pack in packs_of_step(2, 4))
    assert lines[2]["supervised_tokens"] == expected
    assert lines[2]["learning_rate"] == {"vision": 1e-3, "projector": 1e-3, "language": 1e-3}
    assert lines[0]["visual_tokens"] > lines[1]["visual_tokens"] > 0
    assert result.steps == 6
    assert result.evaluation["after"]["caption"] < result.evaluation["before"]["caption"]
    assert set(result.evaluation["after"]) == {"caption", "text"}
    assert sorted(p.name for p in (folder / "checkpoints").glob("step-*")) == ["step-000004", "step-000006"]
    assert json.loads((folder / "result.json").read_text())["per_source"] == {"mixed": 6 * 4 * 3}
    before = (folder / "result.json").stat().st_mtime_ns
    assert _run(tmp_path, recipe)[0] == result  # done already: nothing happens
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_exported_logits_equal_those_in_memory(tmp_path, monkeypatch):
    recipe = tiny_recipe(budget={"steps": 2})
    seen = {}

    def spy(*arguments, **options):
        strategy = prepare_strategy(*arguments, **options)
        seen["model"] = strategy.model
        return strategy

    monkeypatch.setattr("terrace.train.loop.prepare_strategy", spy)
    _run(tmp_path, recipe)
    loaded = AutoModelForImageTextToText.from_pretrained(stage_dir(tmp_path, 0) / "final")
    use_attention(loaded, "sdpa_segments")
    batch = to_device(random_pack(77), "cpu", torch.float32)
    with torch.no_grad():
        in_memory, convolving = (pack_logits_hidden(model, batch)[0] for model in (seen["model"], loaded))
        torch.testing.assert_close(convolving, in_memory, rtol=1e-5, atol=1e-6)
        assert as_products(loaded) == 1  # transformers' class convolves its patches: the last bits are others
        assert torch.equal(in_memory, pack_logits_hidden(loaded, batch)[0])


def test_frozen_parts_do_not_move_and_hand_over_carries_the_rest(tmp_path):
    recipe = tiny_recipe([
        {"name": "warm", "train": {"projector": {"lr": 1e-2}}, "budget": {"steps": 2}},
        {
            "name": "all", "train": {**ALL_PARTS, "projector": {"lr": 1e-3, "optimizer_state": "keep"}},
            "budget": {"steps": 2}, "checkpoint": {"every_steps": 1},
        },
    ])
    _run(tmp_path, recipe)
    untouched = tiny_recipe(budget={"steps": 1}, train={"projector": {"lr": 1e-30}})
    _run(tmp_path / "start", untouched)
    first, second = _weights(stage_dir(tmp_path, 0)), _weights(stage_dir(tmp_path, 1))
    start = _weights(stage_dir(tmp_path / "start", 0))
    for name, tensor in first.items():
        assert torch.equal(tensor, start[name]) == (FAMILY.part_of(name) != "projector"), name
        assert not torch.equal(tensor, second[name]), name
    state = json.loads((stage_dir(tmp_path, 1) / "checkpoints" / "step-000001" / "state.json").read_text())
    for name, steps in state["optimizer_steps"].items():
        assert steps == (3 if FAMILY.part_of(name) == "projector" else 1), name  # kept, fresh


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stop_after):
    recipe = tiny_recipe(budget={"steps": 5}, checkpoint={"every_steps": 2}, schedule={"kind": "cosine", "warmup": 2})
    _run(tmp_path / "straight", recipe)
    with pytest.raises(Preempted):
        _run(tmp_path / "cut", recipe, stop_after=stop_after)
    _run(tmp_path / "cut", recipe)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    straight, cut = _weights(stage_dir(tmp_path / "straight", 0)), _weights(stage_dir(tmp_path / "cut", 0))
    assert all(torch.equal(straight[name], cut[name]) for name in straight)


@pytest.mark.parametrize("fault", ["no manifest", "torn file", "changed byte"])
def test_damaged_checkpoints_are_passed_over_by_name(tmp_path, fault):
    recipe = tiny_recipe(budget={"steps": 4}, checkpoint={"every_steps": 2})
    _run(tmp_path, recipe)
    folder = stage_dir(tmp_path, 0)
    straight, weights = losses(tmp_path), _weights(folder)
    newest = folder / "checkpoints" / "step-000004"
    victim = next(newest.glob("exp_avg-*"))
    if fault == "no manifest":
        (newest / "manifest.json").unlink()
    elif fault == "torn file":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(bytes(content))
    found = newest_complete(folder / "checkpoints", OnThisDisk())
    assert found.path.name == "step-000002"
    assert found.passed_over[0][0] == newest
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "final")
    _run(tmp_path, recipe)
    assert losses(tmp_path) == straight
    assert all(torch.equal(weights[name], tensor) for name, tensor in _weights(folder).items())


def test_an_older_attempt_cannot_write(tmp_path):
    from terrace.train.checkpoint import CheckpointWriter, Superseded

    recipe, context = tiny_recipe(), WorkerContext()
    CheckpointWriter(tmp_path, recipe.stages[0].checkpoint, context, 2, OnThisDisk())
    with pytest.raises(Superseded, match="attempt 2"):
        CheckpointWriter(tmp_path, recipe.stages[0].checkpoint, context, 1, OnThisDisk())


def test_a_changed_recipe_does_not_continue_the_checkpoint(tmp_path):
    with pytest.raises(Preempted):
        _run(tmp_path, tiny_recipe(budget={"steps": 4}), stop_after=2)
    with pytest.raises(InputError, match="new run directory"):
        _run(tmp_path, tiny_recipe(budget={"steps": 4}, optimizer={"weight_decay": 0.5}))


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_samples(tmp_path, policy, monkeypatch):
    recipe = tiny_recipe(budget={"steps": 3}, failure={"on_nonfinite": policy}, checkpoint={"every_steps": 1})
    context, folder = WorkerContext(), stage_dir(tmp_path, 0)
    folder.mkdir()
    feed = memory_feed(recipe, 0, context)
    real = to_device

    def poisoned(pack, device, dtype):
        batch = real(pack, device, dtype)
        if pack.pack == 4:  # the first pack of step 2
            batch.pixels = batch.pixels.float()
            batch.pixels[0] = np.nan
        return batch

    monkeypatch.setattr("terrace.objectives.lm.to_device", poisoned)
    if policy == "skip":
        result = train(recipe, 0, feed, folder, None, context)
        assert result.skipped_steps == 1
        assert [loss is None for loss in losses(tmp_path)] == [False, True, False]
        return
    with pytest.raises(NonFinite, match="sample-4-0"):
        train(recipe, 0, feed, folder, None, context)
    assert newest_complete(folder / "checkpoints", OnThisDisk()).path.name == "step-000001"
    if policy == "rewind":
        result = train(recipe, 0, feed, folder, None, context)
        assert result.skipped_steps == 1
        assert [loss is None for loss in losses(tmp_path)] == [False, True, False]


def test_two_ranks_give_the_losses_of_one(tmp_path):
    recipe = tiny_recipe([
        {"name": "warm", "train": {"projector": {"lr": 1e-3}}, "budget": {"steps": 3}},
        {"name": "all", "budget": {"steps": 5}, "checkpoint": {"every_steps": 2}},
    ])
    _run(tmp_path / "one", recipe)
    run_ranks(2, train_stages, recipe.model_dump(mode="json"), str(tmp_path / "two"))
    for index in (0, 1):
        np.testing.assert_allclose(losses(tmp_path / "two", index), losses(tmp_path / "one", index), rtol=1e-5)
    one, two = _weights(stage_dir(tmp_path / "one", 1)), _weights(stage_dir(tmp_path / "two", 1))
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=2e-5), name
