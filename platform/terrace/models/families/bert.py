"""BERT with torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from terrace.models.families.text_encoder import TextEncoderModel
from terrace.recipe.schema import PartName


class BertModel(TextEncoderModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("bert.", "language"), ("cls.", "language"))
    blocks: ClassVar[Mapping[PartName, str]] = {"language": "bert.encoder.layer"}
    embedding: ClassVar[str] = "bert.embeddings.word_embeddings.weight"
    head: ClassVar[str] = "cls.predictions.decoder.weight"
    body = "bert"

    def before_head(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.cls.predictions.transform(hidden)


MODEL = BertModel
