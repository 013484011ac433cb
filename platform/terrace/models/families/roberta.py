"""RoBERTa with torch: the first place is the row of the table behind that of the padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from terrace.models.families.text_encoder import TextEncoderModel
from terrace.recipe.schema import PartName


class RobertaModel(TextEncoderModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("roberta.", "language"), ("lm_head.", "language"))
    blocks: ClassVar[Mapping[PartName, str]] = {"language": "roberta.encoder.layer"}
    embedding: ClassVar[str] = "roberta.embeddings.word_embeddings.weight"
    head: ClassVar[str] = "lm_head.decoder.weight"
    body = "roberta"

    def places_of(self, positions: torch.Tensor, config: Any) -> torch.Tensor:
        return positions + config.pad_token_id + 1

    def before_head(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        return model.lm_head.layer_norm(F.gelu(model.lm_head.dense(hidden)))


MODEL = RobertaModel
