"""LLaMA-VID with torch: each picture, and each frame of a video, goes through the Q-Former with its sample's question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from terrace.families.qwen2_vl import IMAGE_MEAN, IMAGE_STD
from terrace.models.batch import ImageFacts
from terrace.models.families.interface import PUBLISHED, FamilyModel
from terrace.models.families.own_code import files_of
from terrace.models.modules.configuration_llama_vid import LlamaVidConfig
from terrace.models.modules.modeling_llama_vid import LlamaVidForConditionalGeneration
from terrace.recipe.schema import PartName

AutoConfig.register(LlamaVidConfig.model_type, LlamaVidConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlamaVidConfig, LlamaVidForConditionalGeneration, exist_ok=True)

CONNECTOR = "model.multi_modal_projector."
OF_INSTRUCTBLIP = (f"{CONNECTOR}q_former.", f"{CONNECTOR}query")


class LlamaVidFamily(FamilyModel):
    """The norm behind the tower is read by the Q-Former alone, and trains and freezes with it."""

    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("model.vision_tower.post_layernorm.", "projector"), *FamilyModel.parts)
    code: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "configuration_llama_vid.LlamaVidConfig",
        "AutoModelForImageTextToText": "modeling_llama_vid.LlamaVidForConditionalGeneration",
    }
    mean = IMAGE_MEAN
    std = IMAGE_STD
    published: ClassVar[Sequence[tuple[str, str]]] = (("qformer.", OF_INSTRUCTBLIP[0]), ("query_tokens", OF_INSTRUCTBLIP[1]), *PUBLISHED)

    def may_be_new(self, name: str) -> bool:
        return name.startswith(CONNECTOR) and not name.startswith(OF_INSTRUCTBLIP)

    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        return []

    def code_files(self) -> list[Path]:
        return files_of(self.code.values())

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        """Questions are padded to the longest, and to one token at least, so that what reads them always runs."""
        longest = max(1, int(images.facts[:, 1].max()))
        facts = images.facts.repeat_interleave(images.rows, dim=0)
        read = torch.arange(longest)[None] < facts[:, 1:2]
        asked = {"qformer_input_ids": facts[:, 2 : 2 + longest], "qformer_attention_mask": read.long()}
        return {**super().inputs(values, images), **{name: tensor.to(values.device) for name, tensor in asked.items()}}


MODEL = LlamaVidFamily
