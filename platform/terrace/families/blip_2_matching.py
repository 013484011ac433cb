"""BLIP-2's first stage: a tower and a Q-Former that also reads and writes text; there is no language model yet.

A sample is one picture and its caption, and no placeholder stands for the picture in the text. `vision` is the tower, `projector` all
else. What it learns goes on as the tower and the Q-Former of a `blip_2` (`init: {vision: "stage:...", projector: "stage:..."}`); the
Q-Former's own words stay behind, so the tokenizer may be that of the language model to come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.blip_2 import q_former
from terrace.families.checks import complete, head_count_fits
from terrace.families.interface import Bounds, Finding, Picture
from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD
from terrace.families.shapes import NO_LANGUAGE, ModelShape, ProjectorShape
from terrace.families.two_towers import TOWER_FIELDS, TwoTowers, vision_shape


@dataclass(frozen=True)
class Blip2Matching(TwoTowers):
    """Exported as `Blip2ForImageTextRetrieval`."""

    name: ClassVar[str] = "blip_2_matching"
    gives: ClassVar[str] = "matches"
    parts: ClassVar[tuple[str, ...]] = ("vision", "projector")
    # A written text begins with another mark than a read one: BLIP-2's placeholder, which no caption holds.
    marks: ClassVar[Mapping[str, str]] = {"start": "<s>", "end_of_text": "</s>", "pad": "<pad>", "write": "<image>"}
    beginning: ClassVar[tuple[str, ...]] = ("start",)
    begin_of_text: ClassVar[str] = "start"
    token_fields: ClassVar[Mapping[str, str]] = {"image_token_index": "write"}
    text_fields: ClassVar[Mapping[str, str]] = {"pad_token_id": "pad"}
    mean: ClassVar[tuple[float, ...]] = IMAGE_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGE_STD

    side: int = 224
    patch: int = 14
    context: int = 512
    queries: int = 32

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Blip2Matching:
        vision, former = config.get("vision_config") or {}, config.get("qformer_config") or {}
        return cls(
            int(vision.get("image_size") or cls.side), int(vision.get("patch_size") or cls.patch),
            int(former.get("max_position_embeddings") or cls.context), int(config.get("num_query_tokens") or cls.queries),
        )  # fmt: skip

    def square(self, picture: Picture) -> np.ndarray:
        return picture.planes(self.side, self.side)

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, former, family = config["vision_config"], config["qformer_config"], cls.of(config)
        width, inner, values = int(vision["hidden_size"]), int(former["hidden_size"]), 3 * family.patch**2
        words = int((config.get("text_config") or {}).get("vocab_size") or vocabulary or former.get("vocab_size") or 0)
        common, patches = int(config.get("image_text_hidden_size", 256)), family.patches
        other = values * width + width + width + (patches + 1) * width + 2 * width
        reader = q_former(former, width, patches + 1, family.queries, inner)
        feed = 2 * inner * int(former["intermediate_size"]) + int(former["intermediate_size"]) + inner + 2 * inner
        text = (words + family.context) * inner + int(former["num_hidden_layers"]) * feed
        heads = 2 * (inner * common + common) + 2 * inner + 2 + inner * inner + inner + 2 * inner + words + 1
        parameters = reader.parameters - inner * inner - inner + text + heads
        return ModelShape(
            vision_shape(vision, patches, other, 1), ProjectorShape(parameters, reader.products * family.queries, reader.inner), NO_LANGUAGE
        )

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        for name, fields in (
            ("vision_config", (*TOWER_FIELDS, "image_size", "patch_size")), ("qformer_config", (*TOWER_FIELDS, "max_position_embeddings")),
        ):  # fmt: skip
            part = config.get(name)
            if not isinstance(part, dict):
                yield (), f"needs `{name}`, a map of shape fields"
            elif (yield from complete(part, fields, (name,))):
                yield from head_count_fits(part, (name,))
        former, vision = config.get("qformer_config"), config.get("vision_config")
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob") if isinstance(former, dict) else ():
            if former.get(field, 0.1):
                yield ("qformer_config", field), "must be 0: a step runs the model twice, and both passes must agree"
        if isinstance(former, dict) and isinstance(vision, dict) and former.get("encoder_hidden_size") != vision.get("hidden_size"):
            yield ("qformer_config", "encoder_hidden_size"), f"must be the tower's hidden_size {vision.get('hidden_size')}"
        if isinstance(former, dict) and former.get("use_qformer_text_input") is not True:
            yield ("qformer_config", "use_qformer_text_input"), "must be true: here the Q-Former reads and writes text"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        return super().preprocessor(pixels) | {
            "image_processor_type": "BlipImageProcessor", "processor_class": "Blip2Processor",
            "size": {"height": self.side, "width": self.side},
        }  # fmt: skip


FAMILY = Blip2Matching
