"""InternVL 1.5 to 3: tiles of one size in the nearest aspect ratio and a thumbnail, pixel shuffle, ChatML.

A stage's `pixels.max` bounds the tiles: `max / side^2`, at least one. Coordinates are written in thousandths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from terrace.families.chatml import MARKS, ChatML, chat_template
from terrace.families.checks import complete, language_rules
from terrace.families.interface import Bounds, Finding, Picture, View
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape
from terrace.families.tiles import EqualTiles, cut_tiles

COORDINATE_SCALE = 1000
MOST_TILES = 40  # no published model goes further


@dataclass(frozen=True)
class InternVL(EqualTiles, ChatML):
    """Facts of an image: (rows, columns) of its tiles; a thumbnail follows where there are several."""

    name: ClassVar[str] = "internvl"
    marks: ClassVar[Mapping[str, str]] = {**MARKS, "image_start": "<img>", "image_end": "</img>", "image": "<IMG_CONTEXT>"}
    before: ClassVar[tuple[str, ...]] = ("image_start",)
    after: ClassVar[tuple[str, ...]] = ("image_end",)
    never: ClassVar[tuple[str, ...]] = ("image", "image_start", "image_end", "start_of_turn")
    fact_count: ClassVar[int] = 2
    chat_template: ClassVar[str] = chat_template("<IMG_CONTEXT>")
    token_names: ClassVar[Mapping[str, str]] = {
        "start_image_token": "image_start", "end_image_token": "image_end", "context_image_token": "image",
        "video_token": "end_of_text",  # asked for; stands for nothing, since no videos are read here
    }  # fmt: skip

    side: int = 448
    tokens: int = 256  # of a tile
    patch: int = 14

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> InternVL:
        vision = config.get("vision_config") or {}
        side, patch = _side(vision.get("image_size", 448)), _side(vision.get("patch_size", 14))
        return cls(side, int(side // patch * config.get("downsample_ratio", 0.5)) ** 2, patch)

    # ------------------------------------------------------------ an image

    def most_tiles(self, most_pixels: int) -> int:
        return max(1, min(MOST_TILES, most_pixels // (self.side * self.side)))

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        rows, columns = tile_grid(width, height, self.side, self.most_tiles(pixels[1]))
        tiles = rows * columns + (rows * columns > 1)
        size = (rows * self.side, columns * self.side)
        return View(tiles * self.tokens, tiles, (rows, columns), size, (COORDINATE_SCALE, COORDINATE_SCALE))

    def largest_image_tokens(self, most_pixels: int) -> int:
        tiles = self.most_tiles(most_pixels)
        return (tiles + (tiles > 1)) * self.tokens

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        out = np.empty((view.rows, self.row_values), np.uint8) if out is None else out
        tiles = view.facts[0] * view.facts[1]
        out[:tiles] = cut_tiles(picture.planes(*view.size), self.side)
        if tiles > 1:
            out[tiles] = picture.planes(self.side, self.side).reshape(-1)
        return out

    def pictures_of(self, rows: np.ndarray, facts: Sequence[int]) -> np.ndarray:
        down, across = (int(fact) for fact in facts)
        tiles = rows[: down * across].reshape(down, across, 3, self.side, self.side).transpose(0, 3, 1, 4, 2)
        return np.ascontiguousarray(tiles).reshape(1, down * self.side, across * self.side, 3)

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        tiles = int(facts[0]) * int(facts[1])
        return [(self.side // self.patch, self.side // self.patch)] * (tiles + (tiles > 1))

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        tiles, side = int(facts[0]) * int(facts[1]), math.isqrt(self.tokens)
        return tiles + (tiles > 1), side, side

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, text, family = config["vision_config"], config["text_config"], cls.of(config)
        kind = text.get("model_type", "qwen2")
        biases = kind == "qwen2" or bool(text.get("attention_bias", False))
        language = qwen_language(config, vocabulary, biases, head_norms=kind == "qwen3")
        width, inner, depth = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"]
        norm = width if vision.get("norm_type", "layer_norm") == "rms_norm" else 2 * width
        attention = 4 * width * width + width + (3 * width if vision.get("attention_bias", False) else 0)
        attention += 2 * width if vision.get("use_qk_norm", False) else 0
        block = attention + 2 * width * inner + inner + width + 2 * norm + 2 * width  # two norms, two layer scales
        values, patches = 3 * family.patch**2, (family.side // family.patch) ** 2
        other = values * width + width + width  # patches with a bias, the class token
        other += (patches + 1) * width if vision.get("use_absolute_position_embeddings", True) else 0
        other += width if vision.get("use_mask_token", False) else 0
        unused = 0 if vision.get("use_mean_pooling", True) else 2 * width
        merged = width * patches // family.tokens
        return ModelShape(
            VisionShape(
                depth=depth, width=width, intermediate=inner, heads=vision["num_attention_heads"], gated=False, window=None,
                full_blocks=depth, patch_values=values, patches_per_token=patches / family.tokens, block_parameters=block,
                other_parameters=other + unused, extra_tokens=1, tile_patches=patches,
            ),
            ProjectorShape(
                2 * merged + merged * language.width + language.width * language.width + 2 * language.width,
                language.width * (merged + language.width), language.width,
            ),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        if "tie_word_embeddings" not in config:
            yield (), "needs `tie_word_embeddings`: transformers' InternVL class ties where nothing is said, most published models do not"
        vision, at = config.get("vision_config"), ("vision_config",)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        side, patch = _side(vision.get("image_size", 448)), _side(vision.get("patch_size", 14))
        across = side // patch * config.get("downsample_ratio", 0.5)
        if side % patch or across != int(across):
            yield (*at, "image_size"), f"{side} pixels in patches of {patch} cannot be merged by downsample_ratio"
        if vision["hidden_size"] % vision["num_attention_heads"]:
            yield (*at, "num_attention_heads"), f"{vision['num_attention_heads']} heads do not divide {vision['hidden_size']}"
        if config.get("vision_feature_layer", -1) != -1:
            yield ("vision_feature_layer",), "must be -1, the tower's last layer"

    def check_pixels(self, low: int, high: int) -> Iterator[Finding]:
        if high < self.side * self.side:
            yield ("max",), f"{high} pixels hold no tile: one has {self.side} x {self.side} = {self.side * self.side} pixels"
        yield from super().check_pixels(low, high)

    @classmethod
    def resized(cls, config: Mapping[str, Any], side: int) -> dict[str, Any]:
        vision = config["vision_config"]
        size = [side, side] if isinstance(vision.get("image_size", [448]), list | tuple) else side
        changed = {**config, "vision_config": {**vision, "image_size": size}}
        return {**changed, "image_seq_length": cls.of(changed).tokens} if "image_seq_length" in config else changed

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": self.most_tiles(pixels[1]),
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "size": {"height": self.side, "width": self.side},
        }

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        return self.side**2, self.side**2 * int(values["max_patches"])

    def processor(self) -> dict[str, Any]:
        return {"processor_class": "InternVLProcessor", "image_seq_length": self.tokens}


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


@lru_cache(maxsize=MOST_TILES)
def _grids(most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of at most `most` tiles, in the order in which the published code compares them."""
    found = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most + 1) if columns * rows <= most]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def tile_grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """(rows, columns) of tiles: the nearest aspect ratio; of equal ones the larger, where the picture fills half of it."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels is empty")
    best, best_difference, aspect = (1, 1), math.inf, width / height
    for columns, rows in _grids(most):
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and width * height > 0.5 * side * side * columns * rows:
            best = (columns, rows)
    return best[1], best[0]


FAMILY = InternVL
