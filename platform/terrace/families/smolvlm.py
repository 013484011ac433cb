"""SmolVLM: Idefics3 with SmolLM2's marks, tiles of 512 pixels and fewer tokens for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from terrace.families.idefics3 import VISUAL_MARKS, Idefics3, template


@dataclass(frozen=True)
class SmolVLM(Idefics3):
    """Its videos are refused: give single frames as images."""

    name: ClassVar[str] = "smolvlm"
    marks: ClassVar[Mapping[str, str]] = {
        "start": "<|im_start|>", "end_of_text": "<|im_end|>", "end_of_turn": "<end_of_utterance>", **VISUAL_MARKS
    }  # fmt: skip
    token_names: ClassVar[Mapping[str, str]] = {
        "image_token": "image", "fake_image_token": "around_image", "global_image_token": "global_image",
        "end_of_utterance_token": "end_of_turn",
    }  # fmt: skip
    chat_template: ClassVar[str] = template("<|im_start|>")
    processor_class: ClassVar[str] = "SmolVLMProcessor"
    image_processor: ClassVar[str] = "SmolVLMImageProcessor"

    side: int = 512
    patch: int = 16
    shuffle: int = 4

    def preprocessor(self, pixels: Any) -> dict[str, Any]:
        return {**super().preprocessor(pixels), "return_row_col_info": True}


FAMILY = SmolVLM
