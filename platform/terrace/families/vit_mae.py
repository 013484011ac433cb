"""ViT-MAE: an encoder of pictures that sees a quarter of the patches, and a small decoder that draws the others.

`vision` is the encoder, `projector` the decoder, which is left behind when the encoder goes into another model. There is no
language part: the texts of a source are read by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, head_count_fits
from terrace.families.interface import Bounds, Finding, Picture, Piece
from terrace.families.one_square import Squares
from terrace.families.shapes import NO_LANGUAGE, ModelShape, ProjectorShape, encoder_block
from terrace.families.two_towers import TOWER_FIELDS, vision_shape

DECODER_FIELDS = ("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")


@dataclass(frozen=True)
class VitMae(Squares):
    """`ViTMAEForPreTraining`."""

    name: ClassVar[str] = "vit_mae"
    gives: ClassVar[str] = "pictures"
    marks: ClassVar[Mapping[str, str]] = {"end_of_text": "<|endoftext|>"}
    end_of_turn: ClassVar[str] = "end_of_text"
    mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)  # of ImageNet
    std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VitMae:
        return cls(int(config.get("image_size") or cls.side), int(config.get("patch_size") or cls.patch))

    def square(self, picture: Picture) -> np.ndarray:
        return picture.planes(self.side, self.side)

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        yield from content

    def generation(self) -> Iterator[Piece]:
        raise ValueError(f"{self.name} gives pictures and no answers")

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        width, patch = int(config["hidden_size"]), int(config["patch_size"])
        patches, values = (int(config["image_size"]) // patch) ** 2, 3 * patch * patch
        positions, biases = (patches + 1) * width, 0 if config.get("qkv_bias", True) else 3 * width
        vision = vision_shape(config, patches, width + values * width + width + positions + 2 * width, 1, positions, biases)
        inner = int(config["decoder_hidden_size"])
        block = encoder_block(inner, int(config["decoder_intermediate_size"])) - (0 if config.get("qkv_bias", True) else 3 * inner)
        depth, drawn = int(config["decoder_num_hidden_layers"]), (patches + 1) * inner
        total = width * inner + inner + inner + drawn + depth * block + 2 * inner + inner * values + values
        return ModelShape(vision, ProjectorShape(total, patches * (total - drawn), 0, unused_parameters=drawn), NO_LANGUAGE)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        if not (yield from complete(config, (*TOWER_FIELDS, "image_size", "patch_size", *DECODER_FIELDS), ())):
            return
        yield from head_count_fits(config, ())
        if config["image_size"] % config["patch_size"]:
            yield ("image_size",), f"{config['image_size']} is no multiple of patch_size {config['patch_size']}"
        for width in ("hidden_size", "decoder_hidden_size"):
            if config[width] % 4:
                yield (width,), f"{config[width]} is no multiple of 4: positions are sines and cosines of two axes"
        if not isinstance(config.get("norm_pix_loss"), bool):
            yield (), "needs `norm_pix_loss`: true (as published) takes each patch's own mean and deviation out of it, false does not"
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if config.get(name):
                yield (name,), "must be 0: chance of a process's own would come out differently on other workers"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        size = {"height": self.side, "width": self.side}
        return super().preprocessor(pixels) | {"image_processor_type": "ViTImageProcessor", "size": size}


FAMILY = VitMae
