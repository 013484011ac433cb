"""What the training benchmarks share: models of a stated size, recipes around them, full packs made in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packs import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, pack_segments, segment

from terrace.data.types import PackedExample
from terrace.recipe.schema import Recipe

ALL_PARTS = {"vision": {"lr": 1e-5}, "projector": {"lr": 1e-5}, "language": {"lr": 1e-5}}


def model_values(text: dict[str, Any], vision: dict[str, Any], tied: bool, attention: str = "auto") -> dict[str, Any]:
    """`model:` of a recipe, Qwen2.5-VL with the token ids of tests/packs.py."""
    half_head = text["hidden_size"] // text["num_attention_heads"] // 2
    section = [half_head - 2 * (half_head * 3 // 8), half_head * 3 // 8, half_head * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    fixed = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
    return {
        "architecture": "qwen2_5_vl", "attention": attention,
        "config": {
            "tie_word_embeddings": tied,
            "text_config": {
                "max_position_embeddings": 128_000, "eos_token_id": 502, "bos_token_id": 501, "rope_parameters": rope, **text,
            },
            "vision_config": {**fixed, "out_hidden_size": text["hidden_size"], **vision},
            "image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD,
            "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
        },
    }  # fmt: skip


def qwen_3b(attention: str = "auto") -> dict[str, Any]:
    """The shape of Qwen2.5-VL-3B as published (3.75 billion parameters, input and output embeddings tied)."""
    text = {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return model_values(text, vision, tied=True, attention=attention)


def small_model(attention: str = "auto") -> dict[str, Any]:
    """16 million parameters with the proportions of a real one: a CPU step is mostly matrix products."""
    text = {
        "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {"depth": 4, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "fullatt_block_indexes": [3]}
    return model_values(text, vision, tied=False, attention=attention)


def middle_model(attention: str = "auto") -> dict[str, Any]:
    """55 million parameters: a checkpoint of 0.66 GB."""
    text = {
        "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {"depth": 6, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "fullatt_block_indexes": [5]}
    return model_values(text, vision, tied=False, attention=attention)


def tiny_model(attention: str = "auto") -> dict[str, Any]:
    """For tests of the benchmarks themselves."""
    text = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "fullatt_block_indexes": [1]}
    return model_values(text, vision, tied=True, attention=attention)


def bench_recipe(model: dict[str, Any], steps: int, packs: int, length: int, **stage: Any) -> Recipe:
    """One stage in which all parts train."""
    return Recipe.model_validate({
        "name": "bench", "model": model, "tokenizer": {"path": "none"}, "data": {"sources": {"mixed": {"uri": "nowhere"}}},
        "stages": [{
            "name": "bench", "train": ALL_PARTS, "mixture": {"weights": {"mixed": 1.0}}, "sequence_length": length,
            "budget": {"steps": steps}, "batch": {"packs": packs}, "precision": "fp32",
            "schedule": {"kind": "constant", "warmup": 0}, "data_loading": {"engine": "inline"}, **stage,
        }],
    })  # fmt: skip


def sample_shapes(rng: np.random.Generator, count: int, length: int) -> list[tuple[int, tuple[int, int] | None]]:
    """(text tokens, image side lengths in visual tokens or None) of samples that fill `length` tokens exactly.

    Three of four samples have an image; sizes are spread as widely as in real mixtures (log-normal).
    """
    shares = np.exp(rng.normal(0.0, 0.8, count))
    budgets = np.maximum(12, shares / shares.sum() * length).astype(int)
    budgets[int(budgets.argmax())] += length - int(budgets.sum())
    shapes: list[tuple[int, tuple[int, int] | None]] = []
    for number, budget in enumerate(int(b) for b in budgets):
        image = None
        if number % 4 != 3:
            side = max(1, int((budget * 0.55) ** 0.5))
            rows = max(1, int(side * float(rng.uniform(0.7, 1.3))))
            image = (rows, max(1, int(budget * 0.55) // rows))
        shapes.append((budget - (image[0] * image[1] + 2 if image else 0), image))
    return shapes


def full_pack(number: int, length: int, samples: int) -> PackedExample:
    """A pack of exactly `length` tokens that depends on its number alone."""
    rng = np.random.default_rng([7, number])
    parts = [segment(rng, text, [image] if image else []) for text, image in sample_shapes(rng, samples, length)]
    return pack_segments(number, parts, length)


def export_weights(recipe: Recipe, folder: Path, highest_pixels: int) -> None:
    """The recipe's first weights as a Hugging Face directory, `folder`/weights, with the tokenizer of the data prepared in `folder`."""
    import torch

    from terrace.data.prepare import load_prepared
    from terrace.data.tokenizer import load_tokenizer
    from terrace.models.build import build_model, model_config
    from terrace.models.export import export_hf

    tokenizer_dir = load_prepared(folder / "data").tokenizer_dir
    config = model_config(recipe.model, load_tokenizer(tokenizer_dir))
    state = {name: p.detach() for name, p in build_model(recipe.model, config).named_parameters()}
    with torch.no_grad():
        export_hf(state, config, tokenizer_dir, folder / "weights", (784, highest_pixels), "float32")
