"""Tiny random models, recipes and packs for tests: what the data path would make, without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from terrace.data.types import PackedExample
from terrace.recipe.schema import Recipe

VOCABULARY = 512
PATCH_VALUES = 3 * 14 * 14
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 503, 504, 505, 506
FIRST_SPECIAL = 500


def tiny_model(**changes: Any) -> dict[str, Any]:
    """`model:` of a recipe: Qwen2.5-VL, two layers everywhere, one vision block with windows and one with full attention."""
    return {
        "architecture": "qwen2_5_vl",
        "config": {
            "text_config": {
                "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
                "eos_token_id": 502, "bos_token_id": 501, "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                "window_size": 112, "fullatt_block_indexes": [1], "patch_size": 14, "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            "image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD,
            "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        },
        **changes,
    }


ALL_PARTS = {"vision": {"lr": 1e-3}, "projector": {"lr": 1e-3}, "language": {"lr": 1e-3}}


def tiny_recipe(
    stages: Sequence[dict[str, Any]] | None = None, model: dict[str, Any] | None = None, **stage: Any
) -> Recipe:
    """A recipe of one stage (fields of `stage` over small defaults), or of the given ones."""
    defaults: dict[str, Any] = {
        "name": "one", "train": ALL_PARTS, "mixture": {"weights": {"mixed": 1.0}}, "sequence_length": 256,
        "budget": {"steps": 6}, "batch": {"packs": 4}, "precision": "fp32", "loss_chunk_tokens": 32,
        "schedule": {"kind": "constant", "warmup": 0}, "data_loading": {"engine": "inline"},
    }
    return Recipe.model_validate({
        "name": "tiny",
        "model": model or tiny_model(),
        "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"mixed": {"uri": "nowhere"}}},
        "stages": [{**defaults, **one} for one in (stages or [stage])],
    })


def segment(
    rng: np.random.Generator, text: int, images: Sequence[tuple[int, int]] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One sample: images (rows, columns in visual tokens) and then `text` random tokens, which are supervised.

    Returns ids [L], targets [L], positions [4, L], patches uint8 [P, 588], grids [I, 3].
    """
    ids: list[int] = []
    positions: list[tuple[int, int, int]] = []
    place = 0

    def plain(token: int) -> None:
        nonlocal place
        ids.append(token)
        positions.append((place, place, place))
        place += 1

    grids, patches = [], []
    for rows, columns in images:
        plain(VISION_START)
        for row in range(rows):
            for column in range(columns):
                ids.append(IMAGE_PAD)
                positions.append((place, place + row, place + column))
        place += max(rows, columns)
        plain(VISION_END)
        grids.append((1, 2 * rows, 2 * columns))
        patches.append(rng.integers(0, 256, (4 * rows * columns, PATCH_VALUES), dtype=np.uint8))
    first_text = len(ids)
    for token in rng.integers(0, FIRST_SPECIAL, text):
        plain(int(token))
    targets = np.full(len(ids), -100, np.int32)
    for index in range(max(first_text, 1) - 1, len(ids) - 1):
        targets[index] = ids[index + 1]
    layout = np.concatenate([np.arange(len(ids))[None], np.asarray(positions).T])
    return (
        np.asarray(ids, np.int32),
        targets,
        layout.astype(np.int32),
        np.concatenate(patches) if patches else np.zeros((0, PATCH_VALUES), np.uint8),
        np.asarray(grids, np.int32).reshape(-1, 3),
    )


def pack_segments(number: int, segments: Sequence[tuple[np.ndarray, ...]], sequence_length: int = 256) -> PackedExample:
    """Segments one after another as the data path packs them."""
    ids, targets, positions, patches, grids = (list(column) for column in zip(*segments))
    return PackedExample(
        pack=number,
        input_ids=np.concatenate(ids),
        targets=np.concatenate(targets),
        position_ids=np.concatenate(positions, axis=1),
        segment_ends=np.cumsum([len(part) for part in ids]).astype(np.int32),
        pixels=np.concatenate(patches),
        image_tokens=np.concatenate(grids).prod(axis=1) // 4,
        image_rows=np.concatenate(grids).prod(axis=1),
        image_facts=np.concatenate(grids),
        sample_ids=[f"sample-{number}-{index}" for index in range(len(ids))],
        sources=["mixed"] * len(ids),
        kinds=["caption"] * len(ids),
        sequence_length=sequence_length,
    )


def reference_images(example: Any) -> dict[str, Any]:
    """The images of a pack or a prompt as arguments of transformers' own forward."""
    import torch

    from terrace.models.batch import image_facts
    from terrace.models.families.registry import family_model_named

    if not len(example.image_rows):
        return {}
    family = family_model_named("qwen2_5_vl")
    return family.inputs(family.normalised(torch.from_numpy(example.pixels), torch.float32), image_facts(example))


def random_pack(number: int, with_images: bool = True, segments: int = 3, seed: int = 0) -> PackedExample:
    """A pack that depends on (seed, number) alone."""
    rng = np.random.default_rng([seed, number])
    parts = []
    for index in range(segments):
        images = [(int(rng.integers(1, 6)), int(rng.integers(1, 6)))] if with_images and index % 2 == 0 else []
        parts.append(segment(rng, int(rng.integers(8, 40)), images))
    return pack_segments(number, parts)
