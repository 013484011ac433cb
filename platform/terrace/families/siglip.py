"""SigLIP: pictures pressed into a square, attention pooling; a text tower without a mask that is read at its last position.

The text is padded to all positions of its tower, as the published processor does: the padding is seen and means something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.interface import Bounds, Finding, Picture
from terrace.families.shapes import ModelShape
from terrace.families.two_towers import TwoTowers, text_shape, towers_shape, vision_shape


@dataclass(frozen=True)
class Siglip(TwoTowers):
    """`SiglipModel`. The towers give vectors of one width by themselves: the projector is temperature and bias."""

    name: ClassVar[str] = "siglip"
    marks: ClassVar[Mapping[str, str]] = {"end_of_text": "</s>"}
    begin_of_text: ClassVar[str] = "end_of_text"  # it has none; transformers wants an id
    image_processor: ClassVar[str] = "SiglipImageProcessor"
    processor_class: ClassVar[str] = "SiglipProcessor"

    def square(self, picture: Picture) -> np.ndarray:
        return picture.planes(self.side, self.side)

    @classmethod
    def patches_of(cls, vision: Mapping[str, Any]) -> int:
        """Positions of the vision tower."""
        return (int(vision["image_size"]) // int(vision["patch_size"])) ** 2

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, text = config["vision_config"], config["text_config"]
        width, inner, patches = int(vision["hidden_size"]), int(vision["intermediate_size"]), cls.patches_of(vision)
        common, text_width = int(text.get("projection_size") or text["hidden_size"]), int(text["hidden_size"])
        pooling = width + 4 * width * width + 4 * width + 2 * width + 2 * width * inner + inner + width
        embeddings = 3 * int(vision["patch_size"]) ** 2 * width + width + patches * width
        other = embeddings + 2 * width + (pooling if vision.get("vision_use_head", True) else 0)
        language = text_shape(text, vocabulary, text_width * common + common)
        return towers_shape(vision_shape(vision, patches, other), language, 2, 1)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from super().check(config, trained_tokenizer)
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
        width, common = vision.get("hidden_size"), text.get("projection_size") or text.get("hidden_size")
        if isinstance(width, int) and isinstance(common, int) and width != common:
            yield ("text_config",), f"needs `projection_size` {width}: the width that the vision tower gives, not {common}"
        if not vision.get("vision_use_head", True):
            yield ("vision_config", "vision_use_head"), "must be true: without its pooling a picture has no vector"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return super().preprocessor(pixels) | {
            "image_processor_type": self.image_processor,
            "processor_class": self.processor_class,
            "size": {"height": self.side, "width": self.side},
        }


FAMILY = Siglip
