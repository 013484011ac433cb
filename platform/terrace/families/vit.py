"""A plain vision transformer: an encoder of pictures alone, with a class token. It has one part, `vision`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, head_count_fits
from terrace.families.interface import Bounds, Finding, Picture, Piece
from terrace.families.one_square import Squares
from terrace.families.shapes import NO_LANGUAGE, ModelShape, ProjectorShape
from terrace.families.two_towers import TOWER_FIELDS, vision_shape

NO_DECODER = "it has no decoder that draws patches; use architecture vit_mae"
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class Vit(Squares):
    """`ViTModel`, without the pooler: its class token is what it says of a picture."""

    name: ClassVar[str] = "vit"
    gives: ClassVar[str] = "pictures"
    parts: ClassVar[tuple[str, ...]] = ("vision",)
    refused_objectives: ClassVar[Mapping[str, str]] = {"mae": NO_DECODER}
    marks: ClassVar[Mapping[str, str]] = {"end_of_text": "<|endoftext|>"}
    end_of_turn: ClassVar[str] = "end_of_text"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Vit:
        return cls(int(config.get("image_size") or cls.side), int(config.get("patch_size") or cls.patch))

    def square(self, picture: Picture) -> np.ndarray:
        return picture.planes(self.side, self.side)

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        yield from content

    def generation(self) -> Iterator[Piece]:
        raise ValueError(f"{self.name} reads pictures and gives no answers")

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        width, patch = int(config["hidden_size"]), int(config["patch_size"])
        patches, values = (int(config["image_size"]) // patch) ** 2, 3 * patch * patch
        biases = 0 if config.get("qkv_bias", True) else 3 * width
        other = width + values * width + width + (patches + 1) * width + 2 * width  # class token, patches, positions, last norm
        vision = vision_shape(config, patches, other, 1, 0, biases)
        return ModelShape(vision, ProjectorShape(0, 0, 0), NO_LANGUAGE)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        if not (yield from complete(config, (*TOWER_FIELDS, "image_size", "patch_size"), ())):
            return
        yield from picture_rules(config)

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        size = {"height": self.side, "width": self.side}
        return super().preprocessor(pixels) | {"image_processor_type": "ViTImageProcessor", "size": size}


def picture_rules(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Of an encoder of pictures whose shape fields are there."""
    yield from head_count_fits(config, ())
    if config["image_size"] % config["patch_size"]:
        yield ("image_size",), f"{config['image_size']} is no multiple of patch_size {config['patch_size']}"
    for name in DROPOUTS:
        if config.get(name):
            yield (name,), "must be 0: chance of a process's own would come out differently on other workers"


FAMILY = Vit
