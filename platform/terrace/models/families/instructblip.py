"""InstructBLIP with torch: each image goes through the Q-Former with its sample's question, which its facts hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from terrace.models.batch import ImageFacts
from terrace.models.families.blip_2 import Blip2Model
from terrace.recipe.schema import PartName


class InstructBlipModel(Blip2Model):
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "vision_model.encoder.layers", "language": "language_model.model.layers"}
    embedding: ClassVar[str] = "language_model.model.embed_tokens.weight"

    def language(self, model: Any) -> Any:
        return model.language_model.model

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        """Questions are padded to the longest, and to one token at least, so that what reads them always runs."""
        longest = max(1, int(images.facts[:, 1].max()))
        ids = images.facts[:, 2 : 2 + longest].to(values.device)
        read = torch.arange(longest)[None] < images.facts[:, 1:2]
        return {**super().inputs(values, images), "qformer_input_ids": ids, "qformer_attention_mask": read.long().to(values.device)}


MODEL = InstructBlipModel
