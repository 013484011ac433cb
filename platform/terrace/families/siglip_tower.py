"""The shape of a SigLIP tower, which several families have: LayerNorm, biases everywhere, no class token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from terrace.families.shapes import VisionShape


def siglip_tower(
    vision: Mapping[str, Any], idle: int = 0, patches_per_token: float = 1, post_norm: bool = False, tiles: bool = False
) -> VisionShape:
    """`idle` blocks behind the layer whose features are taken; `post_norm`: the last norm is used, otherwise it never trains.
    `tiles`: an image becomes several pictures of the tower's size."""
    width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
    block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
    patches, values = (vision["image_size"] // vision["patch_size"]) ** 2, 3 * vision["patch_size"] ** 2
    return VisionShape(
        depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False, window=None, full_blocks=depth,
        patch_values=values, patches_per_token=patches_per_token, block_parameters=block,
        other_parameters=values * width + width + patches * width + 2 * width,
        unused_parameters=idle * block + (0 if post_norm else 2 * width), idle_blocks=idle, kept_inner=2,
        tile_patches=patches if tiles else None,
    )  # fmt: skip
