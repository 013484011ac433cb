"""Stages of two towers on rows of a captions source: the order, a resume, another number of workers, damage, a second stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from towers import TOWERS, write_rows
from transformers import AutoModel, AutoTokenizer

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.order.fixed import plan_of
from terrace.data.prepare import prepare_data
from terrace.errors import Preempted
from terrace.planner.plan import make_plan
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext


def recipe_of(folder: Path, name: str = "clip", **first: Any) -> Recipe:
    everything = {part: {"lr": 1e-3} for part in ("vision", "projector", "language")}
    common = {
        "sequence_length": 16, "precision": "fp32", "batch": {"packs": 2, "samples_per_pack": 5}, "pixels": {"min": 1, "max": 3_136},
        "mixture": {"weights": {"captions": 1.0}}, "checkpoint": {"every_steps": 1}, "schedule": {"kind": "constant", "warmup": 0},
        "data_loading": {"engine": "inline"}, "objective": "clip" if name == "clip" else "siglip",
    }  # fmt: skip
    source = {"uri": str(folder / "captions.jsonl"), "holdout_samples": 8, "too_long": "truncate_text"}
    return Recipe.model_validate({
        "name": "pairs", "model": {"architecture": name, "config": TOWERS[name]}, "tokenizer": {"train_vocabulary_size": 330},
        "data": {"sources": {"captions": source}},
        "stages": [
            {"name": "pairs", "train": everything, "budget": {"epochs": 2.5}, "pairs": {"masked_patches": 0.25}, **common, **first},
            {"name": "lit", "train": {"language": {"lr": 1e-3}}, "budget": {"steps": 2}, **common},
        ],
    })  # fmt: skip


def weights_of(run_dir: Path, stage: str) -> str:
    [file] = (run_dir / "stages" / stage / "final").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_pairs_of_a_source_train_resume_hand_over_and_export(tmp_path):
    torch.set_num_threads(1)
    write_rows(tmp_path)
    recipe, run_dir = recipe_of(tmp_path), tmp_path / "run"
    assert check(recipe) == []
    prepared = prepare_data(recipe, run_dir, use_ray=False)
    plan = plan_of(recipe, 0, prepared)
    # 49 rows, 9 of them with two pictures, 8 held out of all: every epoch has each of the others once, in exact steps of ten.
    changes = plan.sources[0].changes
    assert changes["not_one_picture"] > 0
    assert plan.sources[0].count + changes["not_one_picture"] + changes.get("held_out_elsewhere", 0) == 41
    trained = [sample for step in range(plan.total_steps) for pack in plan.packs_of_step(step) for sample in pack.samples]
    epochs = [epoch for step in range(plan.total_steps) for pack in plan.packs_of_step(step) for epoch in pack.epochs]
    count = plan.sources[0].count
    assert len(trained) == int(np.ceil(2.5 * count))
    assert epochs == sorted(epochs)
    assert len({sample.id for sample in trained[:count]}) == count
    assert [len(pack.samples) for pack in plan.packs_of_step(0)] == [5, 5]
    four = recipe_of(tmp_path, batch={"packs": 10, "samples_per_pack": 1})
    other = plan_of(four, 0, prepared)
    assert [s for step in range(other.total_steps) for p in other.packs_of_step(step) for s in p.samples] == trained
    dealt = [pack.pack for hand in other.deal(1, 5) for pack in hand]
    assert dealt == list(range(10, 20))
    resumed = plan_of(recipe, 0, prepared)
    resumed.restore(plan.state(4))
    assert resumed.packs_of_step(4) == plan.packs_of_step(4)

    results = [run_stage(recipe, number, run_dir, 1, WorkerContext()) for number in range(2)]
    assert results[0].steps == plan.total_steps
    assert results[0].evaluation["after"]["caption/loss"] < results[0].evaluation["before"]["caption/loss"]
    # In other packs the same pairs make the same steps; stopped and resumed, the same bits.
    again = tmp_path / "again"
    prepare_data(recipe, again, use_ray=False)
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 0, again, 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 3 else None))
    run_stage(recipe, 0, again, 2, WorkerContext())
    assert weights_of(again, "01-pairs") == weights_of(run_dir, "01-pairs")
    single = tmp_path / "single"
    prepare_data(four, single, use_ray=False)
    run_stage(four, 0, single, 1, WorkerContext())

    def losses(folder):
        lines = (folder / "stages" / "01-pairs" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    np.testing.assert_allclose(losses(single), losses(run_dir), rtol=2e-5)
    # LiT: the second stage moved the text tower alone. Text and tokenizer of the export are what was trained.
    models = {stage: AutoModel.from_pretrained(run_dir / "stages" / stage / "final") for stage in ("01-pairs", "02-lit")}
    before, after = (dict(model.named_parameters()) for model in models.values())
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"text_model"}
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "stages" / "02-lit" / "final")
    assert tokenizer.eos_token_id == models["02-lit"].config.text_config.eos_token_id
    lines = [json.loads(line) for line in (run_dir / "stages" / "01-pairs" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["samples"] == 10
    assert lines[0]["model_flops"] > 0
    stages = make_plan(recipe, gpus=1).stages
    assert stages[0].trainable["vision"] == sum(p.numel() for n, p in before.items() if n.startswith("vision_model."))


def test_a_damaged_pair_of_a_tolerant_source_is_replaced_and_a_cut_caption_keeps_its_end(tmp_path):
    from terrace.data.stream.rank_stream import open_stream

    write_rows(tmp_path)
    recipe = recipe_of(tmp_path, "siglip")
    source = recipe.data.sources["captions"].model_copy(update={"on_damage": "skip"})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": {"captions": source}})})
    prepared = prepare_data(recipe, tmp_path / "run", use_ray=False)
    plan = plan_of(recipe, 0, prepared)
    location = prepared.indexes["captions"].location(plan.packs_of_step(0)[0].samples[1].row)
    member = next(entry for entry in location.members if entry[0].endswith("png"))
    with open(location.shard.removeprefix("file://"), "r+b") as shard:
        shard.seek(member[1] + 30)
        shard.write(b"damaged!")
    first = next(iter(open_stream(plan, prepared, 0, 1, engine="inline"))).packs[0]
    assert first.damaged == (f"captions/{location.id}",)
    assert first.replaced == 1
    assert len(first.sample_ids) == len(first.epochs) == 5
    end = prepared.tokenizer().marks(prepared.family)["end_of_text"]
    texts = np.split(first.input_ids, first.segment_ends[:-1])
    assert all(text[-1] == end and len(text) <= 16 for text in texts)
