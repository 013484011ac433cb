"""LLaVA-OneVision: LLaVA-NeXT's tiles with a SigLIP tower and Qwen2, fewer features for large pictures, one tile among several images.

A picture whose canvas has more features than `anyres_max_N` allows is shrunk in feature space. In a sample with several images each is
one tile, padded to a square: an image's tokens depend on how many its sample has (`among`). Coordinates are LLaVA's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from terrace.families.anyres import Canvases, canvases_of
from terrace.families.chatml import MARKS, ChatML, chat_template
from terrace.families.checks import complete, language_rules
from terrace.families.interface import Bounds, Family, Finding, Picture, View
from terrace.families.llava import SHARES, idle_blocks
from terrace.families.llava_next import LlavaNext, check_canvases
from terrace.families.qwen2_vl import qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape
from terrace.families.siglip_tower import siglip_tower
from terrace.families.tiles import cut_tiles

PINPOINTS = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
PADDING = (127, 127, 127)  # SigLIP's mean as a colour
ENLARGED = 1.1  # canvases up to this many times the side of the limit are not shrunk


@dataclass(frozen=True)
class LlavaOnevision(ChatML, LlavaNext):
    """Facts of an image: its own (height, width), and 1 where it is one of several."""

    name: ClassVar[str] = "llava_onevision"
    marks: ClassVar[Mapping[str, str]] = {**MARKS, "image": "<image>"}
    end_of_text: ClassVar[str] = "end_of_text"
    beginning: ClassVar[tuple[str, ...]] = ()
    begin_of_text: ClassVar[str] = "end_of_text"
    never: ClassVar[tuple[str, ...]] = ("image", "start_of_turn")
    answer_prefix: ClassVar[str] = ""
    default_system: ClassVar[str | None] = "You are a helpful assistant."
    chat_template: ClassVar[str] = chat_template("<image>", system="You are a helpful assistant.")
    fact_count: ClassVar[int] = 3
    processor_class: ClassVar[str] = "LlavaOnevisionProcessor"
    image_processor: ClassVar[str] = "LlavaOnevisionImageProcessor"

    side: int = 384
    canvases: Canvases = PINPOINTS
    most: int = 9  # tiles whose features a picture may keep
    several: bool = False  # this is the family as it sees an image among several

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LlavaOnevision:
        vision = config.get("vision_config") or {}
        most = int(str(config.get("vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_"))
        canvases = canvases_of(config.get("image_grid_pinpoints"), PINPOINTS)
        return cls(vision.get("image_size", 384), vision.get("patch_size", 14), canvases=canvases, most=most)

    # ------------------------------------------------------------ an image

    def among(self, images: int) -> Family:
        return self if self.several == (images > 1) else replace(self, several=images > 1)

    def features(self, width: int, height: int) -> tuple[int, int]:
        rows, columns = super().features(width, height)
        ratio = math.sqrt(rows * columns / (self.most * self.cells**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > ENLARGED else (rows, columns)

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        if not self.several:
            alone = super().view(width, height, pixels)
            return replace(alone, facts=(*alone.facts, 0))
        return View(self.tokens + 1, 1, (height, width, 1), (self.side, self.side), (SHARES, SHARES))  # a newline behind the tile

    def pixels(self, picture: Picture, view: View, out: np.ndarray | None = None) -> np.ndarray:
        if not view.facts[2]:
            return super().pixels(picture, view, out)
        out = np.empty((1, self.row_values), np.uint8) if out is None else out
        out[...] = cut_tiles(picture.padded_square(PADDING).planes(self.side, self.side), self.side)
        return out

    def tower_pictures(self, facts: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.cells, self.cells)] if facts[2] else super().tower_pictures(facts)

    def token_grid(self, facts: Sequence[int]) -> tuple[int, int, int]:
        return (1, 1, self.tokens + 1) if facts[2] else super().token_grid(facts)

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        language = qwen_language(config, vocabulary, attention_biases=True)
        tower, width = siglip_tower(config["vision_config"], idle_blocks(config, -1), tiles=True), language.width
        first = tower.width * width + width * width
        biases = 2 * width if config.get("multimodal_projector_bias", True) else 0
        return ModelShape(tower, ProjectorShape(first + biases + width, first, width), language)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        vision, at = config.get("vision_config"), ("vision_config",)
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        if vision["hidden_size"] % vision["num_attention_heads"]:
            yield (*at, "num_attention_heads"), f"{vision['num_attention_heads']} heads do not divide {vision['hidden_size']}"
        if vision.get("vision_use_head", True):
            yield (*at, "vision_use_head"), "must be false, as published: the pooling head's output is never used"
        if config.get("vision_feature_select_strategy", "full") != "full":
            yield ("vision_feature_select_strategy",), "must be `full`: the tower has no class token"
        if not isinstance(config.get("vision_feature_layer", -1), int):
            yield ("vision_feature_layer",), "must be one layer; several layers side by side are not supported"
        if not str(config.get("vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_").isdigit():
            yield ("vision_aspect_ratio",), f"{config['vision_aspect_ratio']!r} must be `anyres_max_` and a number of tiles"
        yield from check_canvases(config)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        size = {"height": self.side, "width": self.side}
        return {**super().preprocessor(pixels), "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size, "do_center_crop": False,
                "crop_size": size}  # fmt: skip

    def processor(self) -> dict[str, Any]:
        return {
            "processor_class": self.processor_class, "num_image_tokens": self.tokens, "vision_feature_select_strategy": "full",
            "image_token": self.marks["image"], "vision_aspect_ratio": f"anyres_max_{self.most}",
        }  # fmt: skip


FAMILY = LlavaOnevision
