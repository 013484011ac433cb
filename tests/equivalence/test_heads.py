"""Heads that predict further tokens: equal to the formula over single segments, resumed and spread alike, exported beside the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import NAMES, case_of, conversation, pack_of, recipe_model
from packs import random_pack, tiny_recipe
from processes import run_ranks
from ranks import losses, memory_feed, stage_dir, train_each, train_stages
from safetensors.torch import load_file

from terrace.data.types import PackedExample
from terrace.errors import InputError, Preempted
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, materialise, meta_model, model_config
from terrace.models.forward import pack_hidden
from terrace.models.heads import attach_heads, describe_heads, heads_config, read_heads, source_with_heads
from terrace.models.weights import initial_weights
from terrace.objectives.interface import Opening
from terrace.objectives.medusa import Medusa
from terrace.objectives.mtp import Mtp
from terrace.planner.parameters import head_parameters
from terrace.planner.shapes import model_shape
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

HEADS = {"heads": {"lr": 1e-3}}
STAGES: dict[str, dict[str, Any]] = {
    "mtp": {"objective": "mtp", "mtp": {"depth": 2, "switch": 0.5}},
    "medusa": {"objective": "medusa", "medusa": {"heads": 2}},
}


def recipe_of(kind: str, frozen: bool = False, **stage: Any) -> Recipe:
    parts = {} if frozen else {part: {"lr": 1e-3} for part in ("vision", "projector", "language")}
    return tiny_recipe(**{**STAGES[kind], "train": {**parts, **HEADS}, "budget": {"steps": 4}, **stage})


def opened(kind: str, folder: Path, seed: int = 3) -> tuple[Any, Any]:
    """(objective, model with heads), weights large enough for a leak to show."""
    recipe, context = recipe_of(kind), WorkerContext()
    objective = {"mtp": Mtp, "medusa": Medusa}[kind](Opening(recipe, recipe.stages[0], memory_feed(recipe, 0, context), context, folder))
    skeleton = meta_model(model_config(recipe.model))
    source, _ = initial_weights(recipe.model, skeleton, None)
    attach_heads(skeleton, *recipe.stages[0].head_kind)
    model = materialise(skeleton, source_with_heads(skeleton, source, None, 0), "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    use_attention(model, "sdpa_segments")
    return objective, model


def segments_of(pack: PackedExample) -> list[PackedExample]:
    """Each segment as a pack of its own."""
    found, start, image, row = [], 0, 0, 0
    for place, end in enumerate(pack.segment_ends.tolist()):
        tokens = slice(start, end)
        left, images = int(np.isin(pack.input_ids[tokens], [505]).sum()), image
        while left > 0:
            left -= int(pack.image_tokens[image])
            image += 1
        rows = int(pack.image_rows[images:image].sum())
        found.append(dataclasses.replace(
            pack, input_ids=pack.input_ids[tokens], targets=pack.targets[tokens], position_ids=pack.position_ids[:, tokens],
            segment_ends=np.asarray([end - start], np.int32), pixels=pack.pixels[row : row + rows],
            image_facts=pack.image_facts[images:image], image_tokens=pack.image_tokens[images:image],
            image_rows=pack.image_rows[images:image], sample_ids=pack.sample_ids[place : place + 1],
        ))  # fmt: skip
        start, row = end, row + rows
    return found


def written_out(kind: str, model: Any, pack: PackedExample) -> torch.Tensor:
    """The sum over a pack's segments, each on its own, by transformers' own layers and torch's cross-entropy."""
    total = torch.zeros(())
    text = model.model.language_model
    for segment in segments_of(pack):
        batch = to_device(segment, "cpu", torch.float32)
        hidden = pack_hidden(model, batch)
        ids, targets = batch.input_ids[0], torch.from_numpy(segment.targets.astype(np.int64))
        length = len(ids)
        total = total + F.cross_entropy(model.lm_head(hidden), targets, ignore_index=-100, reduction="sum")
        for k in (1, 2):
            count = length - k
            if count <= 0:
                continue
            if kind == "medusa":
                block = model.heads.blocks[k - 1].layers[0]
                rows = hidden[:count] + F.silu(F.linear(hidden[:count], block.weight))
                logits, weight = F.linear(rows, model.heads.lm_heads[k - 1].weight), 0.8**k
            else:
                layer, block = model.heads.layers[k - 1], model.heads.layers[k - 1].block
                embedded = text.embed_tokens(torch.cat([ids[k:], ids[:k]]))
                joined = layer.input_proj(torch.cat([layer.hidden_layernorm(hidden), layer.token_layernorm(embedded)], dim=-1))
                positions = batch.position_ids
                rotary = block.rotary_emb(joined[None], positions[1:])
                mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
                block.config._attn_implementation = "eager"
                out = block.layers[0](joined[None], attention_mask=mask, position_embeddings=rotary, position_ids=positions[0])
                block.config._attn_implementation = model.config.text_config._attn_implementation
                hidden = block.norm(out[0] if isinstance(out, tuple) else out)[0]
                logits, weight = model.lm_head(hidden[:count]), 0.3 / 2
            total = total + weight * F.cross_entropy(logits, targets[k:], ignore_index=-100, reduction="sum")
    return total


@pytest.mark.parametrize("kind", list(STAGES))
def test_value_and_gradients_are_those_of_single_segments(kind, tmp_path):
    torch.set_num_threads(1)
    objective, model = opened(kind, tmp_path)
    pack = random_pack(4, segments=4)
    value = objective.loss(model, objective.batch(pack))
    value.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    expected = written_out(kind, model, pack)
    expected.backward()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    heads = [name for name in gradients if name.startswith("heads.")]
    assert len(heads) > 3
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=2e-6 * largest, msg=name)
    empty = objective.loss(model, objective.batch(objective.empty()))
    assert float(empty.detach()) == 0.0


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("qwen3_vl", "llava") else pytest.mark.slow) for name in NAMES
])
def test_every_family_carries_heads(name, tmp_path_factory):
    """Packed is the sum of single samples, and every tensor of the heads gets a gradient."""
    torch.set_num_threads(1)
    case = case_of(name, tmp_path_factory.getbasetemp() / "tokenizers")
    samples = [conversation(1, [(60, 40)]), conversation(2, []), conversation(3, [(50, 90)])]
    for kind, options in STAGES.items():
        if kind in case.family.refused_objectives:
            continue
        recipe, context = tiny_recipe(model=recipe_model(name), train=HEADS, **options), WorkerContext()
        feed = dataclasses.replace(memory_feed(tiny_recipe(), 0, context), config=case.config)
        objective = {"mtp": Mtp, "medusa": Medusa}[kind](Opening(recipe, recipe.stages[0], feed, context, Path()))
        skeleton = meta_model(case.config)
        source, _ = initial_weights(case.section, skeleton, None)
        attach_heads(skeleton, kind, 2)
        model = materialise(skeleton, source_with_heads(skeleton, source, None, 0), "cpu").requires_grad_(False)
        use_attention(model, "sdpa_segments")
        model.heads.requires_grad_(True)
        value = objective.loss(model, objective.batch(pack_of(case, samples)))
        value.backward()
        idle = [key for key, parameter in model.heads.named_parameters() if parameter.grad is None]
        assert not idle
        with torch.no_grad():
            alone = sum(float(objective.loss(model, objective.batch(pack_of(case, [one])))) for one in samples)
        assert float(value.detach()) == pytest.approx(alone, rel=1e-5)
        assert head_parameters(model_shape(recipe), recipe.stages[0]) == sum(tensor.numel() for tensor in model.heads.parameters())
        assert set(heads_config(model)) >= {"model_type", "hidden_size"}


@pytest.mark.parametrize(("kind", "frozen"), [pytest.param("mtp", False, marks=pytest.mark.slow), ("medusa", True)])
def test_heads_train_resume_and_are_exported_beside_the_model(kind, frozen, tmp_path):
    torch.set_num_threads(1)
    values = recipe_of(kind, frozen, checkpoint={"every_steps": 1}).model_dump(mode="json")
    [result] = train_stages(0, 1, values, str(tmp_path / "whole"))
    after = result.evaluation["after"]
    assert {"acceptance/1", "acceptance/2"} <= set(after)
    assert 0 <= after["acceptance/1"] <= 1
    with pytest.raises(Preempted):
        train_stages(0, 1, values, str(tmp_path / "cut"), stop_after=2)
    train_stages(0, 1, values, str(tmp_path / "cut"))
    folder = stage_dir(tmp_path / "whole", 0) / "final"
    for file in ("model.safetensors", "heads/model.safetensors"):
        assert (folder / file).read_bytes() == (stage_dir(tmp_path / "cut", 0) / "final" / file).read_bytes()
    assert not any(name.startswith("heads.") for name in load_file(folder / "model.safetensors"))
    names = set(load_file(folder / "heads" / "model.safetensors"))
    if kind == "medusa":
        assert names == {f"blocks.{k}.layers.0.weight" for k in (0, 1)} | {f"lm_heads.{k}.weight" for k in (0, 1)}
        section = Recipe.model_validate(values).model
        first, last = (build_model(section, model_config(section), start=start) for start in (None, folder))
        assert all(map(torch.equal, first.parameters(), last.parameters())), "frozen"
    if kind == "mtp":
        assert {"model.mtp_layers.1.input_proj.weight", "model.mtp_layers.0.final_layernorm.weight",
                "model.mtp_layers.0.self_attn.q_proj.weight", "model.mtp_layers.0.token_layernorm.weight"} <= names  # fmt: skip
    assert describe_heads(folder / "heads") == (kind, 2)
    # A stage that starts there goes on with the heads, and one that wants others is told.
    skeleton = meta_model(model_config(Recipe.model_validate(values).model))
    attach_heads(skeleton, kind, 2)
    read = source_with_heads(skeleton, lambda name: torch.zeros(1), folder, 0)
    stored = read_heads(folder / "heads", skeleton.heads)
    assert stored is not None
    assert set(stored) == {name for name, _ in skeleton.named_parameters() if name.startswith("heads.")}
    assert all(torch.equal(read(name), tensor) for name, tensor in stored.items())
    attach_heads(skeleton, kind, 3)
    with pytest.raises(InputError, match=rf"holds 2 heads of kind {kind}, the stage trains 3"):
        read_heads(folder / "heads", skeleton.heads)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_strategy_gives_the_losses_of_one_process(tmp_path):
    torch.set_num_threads(1)
    jobs = {}
    for kind, frozen in (("mtp", False), ("medusa", False), ("medusa", True)):
        name = f"{kind}{'_frozen' if frozen else ''}"
        train_stages(0, 1, recipe_of(kind, frozen).model_dump(mode="json"), str(tmp_path / name))
        for strategy in ("ddp", "fsdp", "zero2", "zero3"):
            jobs[f"{name}-{strategy}"] = recipe_of(kind, frozen, parallel={"strategy": strategy}).model_dump(mode="json")
    run_ranks(2, train_each, jobs, str(tmp_path), timeout=900)
    four = {name.replace("-ddp", "-four"): values for name, values in jobs.items() if name.endswith("-ddp")}
    run_ranks(4, train_each, four, str(tmp_path), timeout=300)
    for name in [*jobs, *four]:
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / name.split("-")[0]), rtol=2e-5, err_msg=name)
