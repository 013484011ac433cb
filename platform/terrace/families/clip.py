"""CLIP: the shorter edge resized to the tower's side and the middle cut out; a causal text tower that is read at its end mark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.interface import Bounds, Finding, Picture
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD
from terrace.families.shapes import ModelShape
from terrace.families.two_towers import TwoTowers, text_shape, towers_shape, vision_shape


@dataclass(frozen=True)
class Clip(TwoTowers):
    """`CLIPModel`. The vision tower has a class token; both towers have a linear map to the common width."""

    name: ClassVar[str] = "clip"
    marks: ClassVar[Mapping[str, str]] = {"start": "<|startoftext|>", "end_of_text": "<|endoftext|>"}
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    mean: ClassVar[tuple[float, ...]] = IMAGE_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGE_STD

    side: int = 224
    patch: int = 32
    context: int = 77

    def square(self, picture: Picture) -> np.ndarray:
        side, shorter = self.side, min(picture.height, picture.width)
        height, width = (side if size == shorter else int(side * size / shorter) for size in (picture.height, picture.width))
        top, left = (height - side) // 2, (width - side) // 2
        return picture.planes(height, width)[:, top : top + side, left : left + side]

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, text, common = config["vision_config"], config["text_config"], int(config.get("projection_dim", 512))
        width, patches = int(vision["hidden_size"]), (vision["image_size"] // vision["patch_size"]) ** 2
        values = 3 * int(vision["patch_size"]) ** 2
        other = width + values * width + (patches + 1) * width + 4 * width  # class token, patches, positions, two norms
        maps = (width + int(text["hidden_size"])) * common
        return towers_shape(vision_shape(vision, patches, other, 1), text_shape(text, vocabulary), maps + 1, maps)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from super().check(config, trained_tokenizer)
        if not isinstance(config.get("projection_dim"), int):
            yield (), "needs `projection_dim`, the width that both towers are mapped to"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return super().preprocessor(pixels) | {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "CLIPProcessor",
            "do_center_crop": True,
            "size": {"shortest_edge": self.side},
            "crop_size": {"height": self.side, "width": self.side},
        }


FAMILY = Clip
