"""Qwen2.5-VL (and MiMo-VL): Qwen2-VL with a gated, windowed tower, and videos whose positions follow the clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from terrace.families.interface import Finding, Visual
from terrace.families.qwen2_vl import Qwen2VL
from terrace.families.shapes import ModelShape

TOKENS_PER_SECOND = 2.0  # of the published configurations


@dataclass(frozen=True)
class Qwen25VL(Qwen2VL):
    name: ClassVar[str] = "qwen2_5_vl"
    processor_class: ClassVar[str] = "Qwen2_5_VLProcessor"

    tokens_per_second: float = TOKENS_PER_SECOND

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Qwen25VL:
        return cls(float((config.get("vision_config") or {}).get("tokens_per_second", TOKENS_PER_SECOND)))

    def temporal_steps(self, visual: Visual) -> np.ndarray:
        """By seconds where a video has them; in float32, as transformers multiplies before it cuts to whole positions."""
        interval = np.asarray(visual.seconds or range(visual.facts[0]), dtype=np.float32)
        return (interval * np.float32(self.tokens_per_second if visual.seconds else 1.0)).astype(np.int32)

    @classmethod
    def shape(cls, config: Mapping[str, Any], vocabulary: int | None = None) -> ModelShape:
        vision = config["vision_config"]
        width, inner = vision["hidden_size"], vision["intermediate_size"]
        block = 4 * width * width + 4 * width + 3 * width * inner + 2 * inner + width + 2 * width
        full = vision.get("fullatt_block_indexes", [7, 15, 23, 31])
        full_blocks = sum(1 for block in full if block < vision["depth"])
        window = int(vision.get("window_size", 112)) // cls.patch
        return cls._shape(config, vocabulary, width, inner, block, gated=True, full=full_blocks, window=window)

    @classmethod
    def check(cls, config: Mapping[str, Any], trained_tokenizer: bool) -> Iterator[Finding]:
        fields = ("hidden_size", "intermediate_size", "depth", "num_heads", "out_hidden_size")
        yield from cls._check(config, trained_tokenizer, fields, width="hidden_size", out="out_hidden_size")


FAMILY = Qwen25VL
