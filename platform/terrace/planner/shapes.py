"""A model's shape from its configuration alone, without torch: what parameters, FLOPs and memory are computed from.

Letters: H width of the language model, W width of the vision tower. A patch is 14 x 14 pixels; four patches make one visual
token. The shape of a recipe that names a pretrained model is read from that directory's config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.recipe.schema import Recipe

PATCH_VALUES = 3 * 2 * 14 * 14  # colours, frames (an image counts twice), pixels
MERGE = 4  # patches of one visual token


@dataclass(frozen=True)
class VisionShape:
    """`gated` and `window` tell Qwen2.5-VL's tower (SwiGLU, RMSNorm, windows) from Qwen2-VL's (GELU, LayerNorm, none)."""

    depth: int
    width: int
    intermediate: int
    heads: int
    gated: bool
    window: int | None  # patches along a window's side; None: every block sees the whole image
    full_blocks: int  # blocks that see the whole image

    @property
    def head_size(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class LanguageShape:
    layers: int
    width: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool  # input and output embeddings are one matrix

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_size


@dataclass(frozen=True)
class ModelShape:
    vision: VisionShape
    language: LanguageShape

    @property
    def merged_width(self) -> int:
        """Width inside the projector: the features of four patches side by side."""
        return self.vision.width * MERGE


def model_shape(recipe: Recipe) -> ModelShape:
    """The shape of the recipe's model. Raises InputError where only a remote directory knows it."""
    model = recipe.model
    config = model.config
    if config is None:
        folder = str(model.pretrained)
        file = Path(folder) / "config.json"
        if "://" in folder or not file.is_file():
            raise InputError(
                f"model.pretrained: {file} cannot be read here, and the plan needs the model's shape; copy its config.json "
                "to a local directory of that layout or write its fields under model.config"
            )
        config = json.loads(file.read_text(encoding="utf-8"))
    return shape_of_config(config, model.architecture, recipe.tokenizer.train_vocabulary_size)


def shape_of_config(config: Mapping[str, Any], architecture: str, vocabulary: int | None = None) -> ModelShape:
    """The shape of a transformers configuration map; `vocabulary` is used where the configuration has none."""
    text, vision = config["text_config"], config["vision_config"]
    modern = architecture == "qwen2_5_vl"
    width = vision["hidden_size" if modern else "embed_dim"]
    if modern:
        full = vision.get("fullatt_block_indexes", [7, 15, 23, 31])
        full_blocks = sum(1 for block in full if block < vision["depth"])
        window = int(vision.get("window_size", 112)) // 14
    else:
        full_blocks, window = vision["depth"], None
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return ModelShape(
        vision=VisionShape(
            depth=vision["depth"],
            width=width,
            intermediate=vision["intermediate_size"] if modern else int(width * vision["mlp_ratio"]),
            heads=vision["num_heads"],
            gated=modern,
            window=window,
            full_blocks=full_blocks,
        ),
        language=LanguageShape(
            layers=text["num_hidden_layers"],
            width=text["hidden_size"],
            intermediate=text["intermediate_size"],
            heads=text["num_attention_heads"],
            key_heads=text["num_key_value_heads"],
            head_size=text["hidden_size"] // text["num_attention_heads"],
            vocabulary=text.get("vocab_size") or vocabulary or 0,
            tied=bool(tied),
        ),
    )
