"""The planner's closed forms equal the model that transformers builds: parameters exactly, FLOPs within 1 %."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from terrace.data.types import PackedExample
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, meta_model, model_config
from terrace.models.families.registry import family_of_model
from terrace.models.parts import part_parameters
from terrace.objectives.lm import summed_loss
from terrace.planner.flops import exact_load, forward_flops, training_flops
from terrace.planner.parameters import language_layer, parameter_counts, trainable_counts
from terrace.planner.shapes import model_shape
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import PARTS, Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
MIMO = REPOSITORY / "jobs" / "recipes" / "mimo-vl-7b.yaml"
TINY = REPOSITORY / "tests" / "recipes" / "tiny.yaml"
TINY_VOCABULARY = ["tokenizer=/none", "model.config.text_config.vocab_size=1024"]
QWEN2 = [
    *TINY_VOCABULARY, "model.architecture=qwen2_vl",
    "model.config.vision_config={embed_dim: 32, mlp_ratio: 2, depth: 2, num_heads: 2, hidden_size: 64}",
]  # fmt: skip
CASES = [
    (MIMO, []),
    (REPOSITORY / "jobs" / "recipes" / "qwen2.5-vl-7b.yaml", []),
    (REPOSITORY / "jobs" / "recipes" / "qwen-vl-7b.yaml", []),
    (TINY, TINY_VOCABULARY),
    (TINY, [*TINY_VOCABULARY, "model.config.tie_word_embeddings=true"]),
    (TINY, QWEN2),
]


def config_of(recipe: Recipe) -> Any:
    config = dict(recipe.model.config or {})
    if recipe.model.architecture == "qwen2_vl":  # the tiny recipe's map still has Qwen2.5-VL's keys
        config["vision_config"] = {
            key: value for key, value in config["vision_config"].items()
            if key not in ("intermediate_size", "out_hidden_size", "window_size", "fullatt_block_indexes")
        }  # fmt: skip
    return model_config(recipe.model.model_copy(update={"config": config}))


@pytest.mark.parametrize(("path", "overrides"), CASES, ids=[f"{path.stem}-{len(more)}" for path, more in CASES])
def test_parameters_equal_the_model_on_the_meta_device(path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(path, overrides)
    model = meta_model(config_of(recipe))
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    shape = model_shape(recipe)
    assert parameter_counts(shape) == counted
    assert shape.vision.block_parameters == sum(p.numel() for p in family_of_model(model).blocks_of(model, "vision")[0].parameters())
    assert language_layer(shape) == sum(p.numel() for p in model.model.language_model.layers[0].parameters())


def test_mimo_vl_7b_has_the_published_sizes() -> None:
    recipe = load_recipe(MIMO)
    shape = model_shape(recipe)
    counts = parameter_counts(shape)
    assert counts == {"vision": 636_401_664, "projector": 47_196_416, "language": 7_622_619_136}
    trainable = [sum(trainable_counts(shape, stage).values()) for stage in recipe.stages]
    assert trainable == [counts["projector"], counts["vision"] + counts["projector"], sum(counts.values()), sum(counts.values())]


# ---------------------------------------------------------------- FLOPs


def pack(segments: Sequence[tuple[int, tuple[int, int] | None]]) -> PackedExample:
    """Segments of (tokens, image grid in patches or None): the image's tokens first, then text that is supervised."""
    ids, targets, positions, ends, grids = [], [], [], [], []
    for length, grid in segments:
        visual = grid[0] * grid[1] // 4 if grid else 0
        ids += [5] * visual + [7] * (length - visual)
        targets += [-100] * visual + [9] * (length - visual)
        positions += list(range(length))
        ends.append(len(ids))
        if grid:
            grids.append((1, *grid))
    patches = sum(h * w for _, h, w in grids)
    return PackedExample(
        pack=0,
        input_ids=np.array(ids, np.int32),
        targets=np.array(targets, np.int32),
        position_ids=np.tile(np.array(positions, np.int32), (4, 1)),
        segment_ends=np.array(ends, np.int32),
        pixels=np.zeros((patches, 588), np.uint8),
        image_tokens=np.array([h * w // 4 for _, h, w in grids], np.int32),
        image_rows=np.array([h * w for _, h, w in grids], np.int32),
        image_facts=np.array(grids, np.int32).reshape(-1, 3),
        sample_ids=[str(n) for n in range(len(segments))],
        sources=["s"] * len(segments),
        kinds=["caption"] * len(segments),
        sequence_length=len(ids),
    )


PACKS = {
    "one image": [(60, (8, 12))],
    "images and text": [(70, (10, 18)), (33, None), (48, (4, 6))],
    "text only": [(40, None), (24, None)],
}


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("segments", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize(
    "trained",
    [("projector",), ("vision", "projector"), ("vision",), ("vision", "projector", "language"), ("language",)],
    ids="+".join,
)
def test_flops_are_those_of_the_flop_counter(
    segments: list[tuple[int, tuple[int, int] | None]], trained: tuple[str, ...], architecture: str
) -> None:
    recipe = load_recipe(TINY, TINY_VOCABULARY if architecture == "qwen2_5_vl" else QWEN2)
    config = config_of(recipe)
    config.image_token_id, config.video_token_id = 5, 6
    torch.set_num_threads(1)
    model = build_model(recipe.model, config)
    use_attention(model, "sdpa_segments")
    for part, pairs in part_parameters(model).items():
        for _, parameter in pairs:
            parameter.requires_grad_(part in trained)
    example = pack(segments)
    batch = to_device(example, "cpu", torch.float32)
    shape = model_shape(recipe)
    pictures = [grid for _, grid in segments if grid] or [(2, 2)]
    load = exact_load(shape, [length for length, _ in segments], pictures, example.supervised_tokens)
    flops = training_flops(shape, load, trained)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        summed_loss(model, batch, 64).backward()
    assert counter.get_total_flops() == pytest.approx(flops.model, rel=0.01)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        summed_loss(model, batch, 64)
    assert counter.get_total_flops() == pytest.approx(sum(forward_flops(shape, load).values()), rel=0.01)


def test_checkpointing_adds_one_forward_of_the_blocks() -> None:
    recipe = load_recipe(MIMO)
    shape = model_shape(recipe)
    load = exact_load(shape, [8192], [(64, 64)], 4096)
    plain = training_flops(shape, load, PARTS)
    kept = training_flops(shape, load, PARTS, ["vision", "language"])
    assert kept.model == plain.model
    assert 0.25 < (kept.hardware - plain.hardware) / plain.model < 1 / 3


# ---------------------------------------------------------------- memory

MID = [
    "tokenizer=/none",
    "model.config.text_config={vocab_size: 4096, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 4, "
    "num_attention_heads: 4, num_key_value_heads: 2}",
    "model.config.text_config.rope_parameters={mrope_section: [8, 12, 12]}",
    "model.config.vision_config={hidden_size: 128, intermediate_size: 344, depth: 4, num_heads: 4, out_hidden_size: 256}",
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("trained", [("projector",), ("vision", "projector"), ("vision", "projector", "language")], ids="+".join)
def test_activations_are_what_autograd_saves(trained: tuple[str, ...], checkpointing: str, precision: str) -> None:
    """ddp on CPU: everything saved for backward, without the weights themselves, within 10 %."""
    from terrace.models.precision import DTYPES, compute_context
    from terrace.planner.memory import PackSize, matrices_in_backward, stage_memory
    from terrace.train.setup import checkpoint_activations

    parts = {part: f"{{lr: 1e-3, activation_checkpointing: {checkpointing}}}" if part in trained else "null" for part in PARTS}
    overrides = [f"stages.2.train={{{', '.join(f'{part}: {value}' for part, value in parts.items())}}}"]
    overrides += [f"stages.2.precision={precision}", "stages.2.sequence_length=512", "stages.2.loss_chunk_tokens=64"]
    recipe = load_recipe(TINY, [*MID, *overrides])
    for part in set(PARTS) - set(trained):  # a null in a map keeps the base's value where the key is a field
        assert getattr(recipe.stages[2].train, part) is None
    stage, shape, config = recipe.stages[2], model_shape(recipe), config_of(recipe)
    config.image_token_id, config.video_token_id = 5, 6
    torch.set_num_threads(1)
    model = build_model(recipe.model, config)
    use_attention(model, "sdpa_segments")
    model.train()
    for part, pairs in part_parameters(model).items():
        for _, parameter in pairs:
            parameter.requires_grad_(part in trained)
    checkpoint_activations(model, stage)
    example = pack([(150, (16, 16)), (200, (16, 24)), (162, (12, 32))])
    batch = to_device(example, "cpu", DTYPES[precision])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # held, so that no storage is freed and its address used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with compute_context(precision, "cpu"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(model, batch, 64)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    size = PackSize(512, len(example.pixels) / 4, example.supervised_tokens)
    memory = stage_memory(shape, stage, 1, size, on_gpu=False)
    head = 4 * example.supervised_tokens * 256 + (4 * 4096 * 256 if "language" in trained else 0)  # its gradients, made forward
    copies = 2 * matrices_in_backward(shape, stage) if precision == "bf16" else 0
    if checkpointing == "true":  # blocks that are computed again save no copies of their matrices
        copies -= 2 * sum(4 * block for part, block in (("vision", shape.vision.block_parameters), ("language", language_layer(shape)))
                          if part in trained) if copies else 0  # fmt: skip
    assert measured == pytest.approx(memory.vision_activations + memory.language_activations + head + copies, rel=0.1)


HUB = {  # the flat layout of Qwen2.5-VL's published config.json: no `text_config`
    "model_type": "qwen2_5_vl", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}, "image_token_id": 5, "video_token_id": 6, "bos_token_id": 1,
    "eos_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4,
    "vision_config": {"depth": 2, "hidden_size": 128, "intermediate_size": 344, "num_heads": 4, "out_hidden_size": 256,
                      "patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
                      "tokens_per_second": 2, "temporal_patch_size": 2},
}  # fmt: skip


def test_a_published_configuration_without_parts_is_planned_as_it_is_built(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    recipe = load_recipe(TINY, ["model.config=null", f"model.pretrained={tmp_path}", "tokenizer=/none"])
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(meta_model(config_of(recipe))).items()}
    assert parameter_counts(model_shape(recipe)) == counted
