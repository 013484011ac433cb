"""GLM-4.1V: Qwen2-VL's way with a picture and its positions, GLM's conversation form, a tower with a convolution in front of the projector.

An answer ends with the mark of the next user turn, which then is not written again: GLM has no other. Pictures with a side below one
token are enlarged first. Coordinates are written in thousandths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from terrace.families.checks import complete, head_size, language_rules, mrope_section
from terrace.families.interface import Bounds, Costs, Family, Finding, Piece, View
from terrace.families.qwen2_vl import TEMPORAL_PATCH_SIZE, Qwen2VL, qwen_language
from terrace.families.shapes import ModelShape, ProjectorShape, VisionShape

COORDINATE_SCALE = 1000
MROPE_SECTION = [8, 12, 12]  # the class's own where nothing is said


@dataclass(frozen=True)
class Glm4V(Qwen2VL):
    """Facts of an image: its grid (t, h, w) in patches."""

    name: ClassVar[str] = "glm4v"
    marks: ClassVar[Mapping[str, str]] = {
        "end_of_text": "<|endoftext|>", "mask": "[gMASK]", "start": "<sop>", "system": "<|system|>", "end_of_turn": "<|user|>",
        "assistant": "<|assistant|>", "image_start": "<|begin_of_image|>", "image_end": "<|end_of_image|>", "image": "<|image|>",
        "video_start": "<|begin_of_video|>", "video_end": "<|end_of_video|>", "video": "<|video|>",
    }  # fmt: skip
    before: ClassVar[tuple[str, ...]] = ("image_start",)
    after: ClassVar[tuple[str, ...]] = ("image_end",)
    beginning: ClassVar[tuple[str, ...]] = ("mask", "start")
    never: ClassVar[tuple[str, ...]] = (
        "mask", "start", "system", "assistant", "image_start", "image_end", "image", "video_start", "video_end", "video"
    )  # fmt: skip
    videos: ClassVar[bool] = False
    token_fields: ClassVar[Mapping[str, str]] = {
        f"{role}_token_id": role for role in ("image", "image_start", "image_end", "video", "video_start", "video_end")
    }
    token_names: ClassVar[Mapping[str, str]] = {"image_token": "image", "video_token": "video"}
    chat_template: ClassVar[str] = (
        "[gMASK]<sop>{% set ns = namespace(before='') %}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}<|assistant|>{% elif message['role'] == 'system' %}<|system|>"
        "{% elif ns.before != 'assistant' %}<|user|>{% endif %}{{ '\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% elif item['type'] == 'text' %}{{ item['text'] }}"
        "{% endif %}{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<|user|>{% endif %}"
        "{% set ns.before = message['role'] %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    image_processor: ClassVar[str] = "Glm4vImageProcessor"
    processor_class: ClassVar[str] = "Glm4vProcessor"

    # ------------------------------------------------------------ an image

    def view(self, width: int, height: int, pixels: Bounds) -> View:
        if width < 1 or height < 1:
            raise ValueError(f"an image of {width}x{height} pixels is empty")
        if min(width, height) < self.side:
            scale = max(self.side / height, self.side / width)
            height, width = int(height * scale), int(width * scale)
        return super().view(width, height, pixels)

    def costs(self, widths: np.ndarray, heights: np.ndarray, pixels: Bounds) -> Costs:
        widths, heights = np.asarray(widths), np.asarray(heights)
        scale = np.maximum(1.0, np.maximum(self.side / heights, self.side / widths))
        return super().costs((widths * scale).astype(np.int64), (heights * scale).astype(np.int64), pixels)

    def scale_of(self, height: Any, width: Any) -> tuple[Any, Any]:
        fixed = np.full_like(height, COORDINATE_SCALE) if isinstance(height, np.ndarray) else COORDINATE_SCALE
        return fixed, fixed

    # ------------------------------------------------------------ a conversation

    def plain_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """A question behind an answer has its mark already: it becomes a turn of its own role."""
        plain = Family.plain_turns(self, messages)
        before = [None, *(message["role"] for message in plain)]
        return [
            {**message, "role": "next_user"} if message["role"] == "user" and role == "assistant" else message
            for message, role in zip(plain, before)
        ]

    def opening(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
        return iter(())

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        if role not in ("system", "user", "next_user", "assistant"):
            raise ValueError(f"GLM's form has no turn of role {role!r}")
        if role != "next_user":
            yield "mark", {"user": "end_of_turn"}.get(role, role), False
        yield "text", "\n", False
        if role == "assistant":
            yield "cut", None, False
        yield from content
        if role == "assistant":
            yield "mark", "end_of_turn", supervised

    def generation(self) -> Iterator[Piece]:
        yield "mark", "assistant", False
        yield "text", "\n", False

    # ------------------------------------------------------------ configuration

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision, language = config["vision_config"], replace(qwen_language(config, vocabulary, attention_biases=True), norms=4)
        width, inner, out, depth = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"], vision["depth"]
        values, merged = 3 * TEMPORAL_PATCH_SIZE * cls.patch**2, cls.merge**2
        places = (vision.get("image_size", 336) // cls.patch) ** 2
        block = 4 * width * width + 3 * width * out + 2 * width + (3 * width if vision.get("attention_bias", False) else 0)
        products = merged * width * out + out * out + 3 * out * inner
        return ModelShape(
            VisionShape(
                depth=depth, width=width, intermediate=out, heads=vision["num_heads"], gated=True, window=None, full_blocks=depth,
                patch_values=values, patches_per_token=merged, block_parameters=block,
                other_parameters=values * width + width + places * width + 2 * width, outer_norms=2,
            ),
            ProjectorShape(products + out + 2 * out, products, 2 * inner),
            language,
        )  # fmt: skip

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        yield from language_rules(config, trained_tokenizer)
        text, vision, at = config.get("text_config"), config.get("vision_config"), ("vision_config",)
        if isinstance(text, dict) and all(text.get(field) for field in ("hidden_size", "num_attention_heads")):
            section = mrope_section(text) or MROPE_SECTION
            turned = int(head_size(text) * (text.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0))
            if len(section) != 3 or sum(section) * 2 != turned:
                yield ("text_config",), f"mrope_section {section} must be three numbers that sum to {turned // 2} (half of what is rotated)"
        fields = ("hidden_size", "intermediate_size", "depth", "num_heads", "out_hidden_size")
        if not isinstance(vision, dict) or not (yield from complete(vision, fields, at)):
            return
        fixed = {"patch_size": cls.patch, "spatial_merge_size": cls.merge, "temporal_patch_size": TEMPORAL_PATCH_SIZE}
        for field, value in fixed.items():
            if vision.get(field, value) != value:
                yield (*at, field), f"{vision[field]}: this platform's preprocessing is made for {value}"
        if vision["hidden_size"] % (vision["num_heads"] * 4):
            told = f"{vision['hidden_size']} / {vision['num_heads']} heads is no multiple of 4, which 2-D rotary positions need"
            yield (*at, "num_heads"), told
        if isinstance(text, dict) and text.get("hidden_size") and vision["out_hidden_size"] != text["hidden_size"]:
            yield at, f"the projector gives vectors of {vision['out_hidden_size']}, the language model takes {text['hidden_size']}"

    def preprocessor(self, pixels: Bounds) -> dict[str, Any]:
        """Its processor counts a picture as two frames: the bounds are twice ours."""
        size = {"shortest_edge": pixels[0] * TEMPORAL_PATCH_SIZE, "longest_edge": pixels[1] * TEMPORAL_PATCH_SIZE}
        values = {**super().preprocessor(pixels), "size": size}
        return {name: value for name, value in values.items() if name not in ("min_pixels", "max_pixels")}

    def exported_pixels(self, values: Mapping[str, Any]) -> Bounds:
        low, high = (int(values["size"][edge]) // TEMPORAL_PATCH_SIZE for edge in ("shortest_edge", "longest_edge"))
        return low, high

    def processor(self) -> dict[str, Any]:
        return {"processor_class": self.processor_class}


FAMILY = Glm4V
