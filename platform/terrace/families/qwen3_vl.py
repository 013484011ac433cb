"""Qwen3-VL: patches of 16 pixels, learned and rotary positions in the tower, features for several language layers (deepstack).

Coordinates are written in thousandths of the image. Videos, whose text carries a time stamp per frame, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.chatml import chat_template
from terrace.families.interface import Family, Finding
from terrace.families.qwen2_vl import TEMPORAL_PATCH_SIZE, Qwen2VL, qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape

DEEPSTACK = (8, 16, 24)  # transformers' default: blocks whose features go to the first language layers
COORDINATE_SCALE = 1000


@dataclass(frozen=True)
class Qwen3VL(Qwen2VL):
    name: ClassVar[str] = "qwen3_vl"
    default_system: ClassVar[str | None] = None
    writes_tools: ClassVar[bool] = False  # its template has another form of them
    videos: ClassVar[bool] = False
    chat_template: ClassVar[str] = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    patch: ClassVar[int] = 16
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    processor_class: ClassVar[str] = "Qwen3VLProcessor"
    video_facts = Family.video_facts
    video_pixels = Family.video_pixels

    def scale_of(self, height: Any, width: Any) -> tuple[Any, Any]:
        return height * 0 + COORDINATE_SCALE, width * 0 + COORDINATE_SCALE

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision = config["vision_config"]
        language = qwen_language(config, vocabulary, attention_biases=False, head_norms=True)
        width, inner, values = vision["hidden_size"], vision["intermediate_size"], 3 * TEMPORAL_PATCH_SIZE * cls.patch**2
        block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
        merged, deep = width * cls.merge**2, len(vision.get("deepstack_visual_indexes", DEEPSTACK))
        layers = merged * merged + merged + merged * language.width + language.width
        return ModelShape(
            VisionShape(
                depth=vision["depth"], width=width, intermediate=inner, heads=vision["num_heads"], gated=False, window=None,
                full_blocks=vision["depth"], patch_values=values, patches_per_token=cls.merge**2, block_parameters=block,
                other_parameters=values * width + width + vision.get("num_position_embeddings", 2304) * width,
            ),
            ProjectorShape(2 * width + layers + deep * (2 * merged + layers), merged * (merged + language.width), merged, 1 + deep),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        fields = ("hidden_size", "intermediate_size", "depth", "num_heads", "out_hidden_size")
        yield from cls._check(config, trained_tokenizer, fields, width="hidden_size", out="out_hidden_size")
        vision, text = config.get("vision_config"), config.get("text_config")
        if not isinstance(vision, dict) or not isinstance(text, dict):
            return
        deep = vision.get("deepstack_visual_indexes", list(DEEPSTACK))
        for block in deep:
            if not isinstance(block, int) or not 0 <= block < (vision.get("depth") or block + 1):
                yield ("vision_config", "deepstack_visual_indexes"), f"there is no block {block}, counted from 0"
        if len(deep) > (text.get("num_hidden_layers") or len(deep)):
            yield ("vision_config", "deepstack_visual_indexes"), "names more blocks than the language model has layers"


FAMILY = Qwen3VL
