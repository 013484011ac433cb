"""A model and processor as TRL's trainers take them, from an exported folder. Nothing of Terrace is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# torchvision's wheel is built for CUDA: transformers imports it where it lies, and nothing calls these. Before transformers is imported.
_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor x) -> Tensor")
_LIBRARY.define("qnms(Tensor x) -> Tensor")


def trl_model(weights: Path, max_pixels: int) -> tuple[Any, Any]:
    """(processor, model in float32)."""
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2TokenizerFast,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = Qwen2TokenizerFast.from_pretrained(weights, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=784, max_pixels=max_pixels), tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return processor, Qwen2_5_VLForConditionalGeneration.from_pretrained(weights, dtype=torch.float32, attn_implementation="sdpa")
