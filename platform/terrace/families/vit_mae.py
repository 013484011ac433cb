"""ViT-MAE: an encoder of pictures that sees a quarter of the patches, and a small decoder that draws the others.

`vision` is the encoder, `projector` the decoder, which is left behind when the encoder goes into another model. There is no
language part: the texts of a source are read by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.checks import complete
from terrace.families.interface import Finding
from terrace.families.shapes import NO_LANGUAGE, ModelShape, ProjectorShape, encoder_block
from terrace.families.two_towers import TOWER_FIELDS, vision_shape
from terrace.families.vit import Vit, picture_rules

DECODER_FIELDS = ("decoder_hidden_size", "decoder_intermediate_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")


@dataclass(frozen=True)
class VitMae(Vit):
    """`ViTMAEForPreTraining`."""

    name: ClassVar[str] = "vit_mae"
    parts: ClassVar[tuple[str, ...]] = ("vision", "projector")
    refused_objectives: ClassVar[Mapping[str, str]] = {}
    mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)  # of ImageNet
    std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)

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
        yield from picture_rules(config)
        for width in ("hidden_size", "decoder_hidden_size"):
            if config[width] % 4:
                yield (width,), f"{config[width]} is no multiple of 4: positions are sines and cosines of two axes"
        if not isinstance(config.get("norm_pix_loss"), bool):
            yield (), "needs `norm_pix_loss`: true (as published) takes each patch's own mean and deviation out of it, false does not"


FAMILY = VitMae
