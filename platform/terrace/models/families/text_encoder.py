"""What encoders of text alone share with torch: embeddings, blocks that look both ways, and the head that fills masked tokens.

The class's own embeddings and encoder are called, a pack's samples behind one another, so what comes out is what the class gives each of
them alone. A class that draws dropout has none here, also where a published configuration says so, which an export keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import AutoModelForMaskedLM

from terrace.errors import InputError
from terrace.families.text_encoder import DROPOUTS
from terrace.models.batch import DeviceBatch
from terrace.models.families.interface import FamilyModel
from terrace.models.head import install_loss_head

OLD_NORMS = ((".gamma", ".weight"), (".beta", ".bias"))  # names of a LayerNorm's tensors in BERT's first checkpoints


class TextEncoderModel(FamilyModel):
    """`body` is the name of the encoder inside the class, `fills` that of the module which holds the head's layers."""

    body: ClassVar[str] = ""

    def skeleton(self, config: Any) -> Any:
        quiet = copy.deepcopy(config)
        for name in DROPOUTS:
            setattr(quiet, name, 0.0)
        model = AutoModelForMaskedLM.from_config(quiet, dtype=torch.float32)
        install_loss_head(model, self.head.removesuffix(".weight"))
        return model

    def canonical_name(self, name: str) -> str:
        for old, new in OLD_NORMS:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        return name if name.startswith(tuple(prefix for prefix, _ in self.parts)) else f"{self.body}.{name}"

    def language(self, model: Any) -> Any:
        return getattr(model, self.body)

    def vision(self, model: Any) -> Any:
        raise InputError(f"{self.family.name} has no tower that sees")

    def visual_ids(self, config: Any) -> tuple[int, ...]:
        return ()

    def places_of(self, positions: torch.Tensor, config: Any) -> torch.Tensor:
        """Rows of the table of positions for places [1, L] counted from 0."""
        return positions

    def hidden(self, model: Any, batch: DeviceBatch, attention: Mapping[str, Any]) -> torch.Tensor:
        if batch.longest > self.family.context:
            raise InputError(
                f"pack {batch.example.pack} has a sample of {batch.longest} tokens and {self.family.name} {self.family.context} positions:"
                " lower sequence_length, or give a configuration with more `max_position_embeddings`"
            )
        encoder = self.language(model)
        embedded = encoder.embeddings(input_ids=batch.input_ids, position_ids=self.places_of(batch.position_ids[0], model.config))
        return encoder.encoder(embedded, attention_mask=None, **attention).last_hidden_state[0]

    def before_head(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What the output layer reads of hidden states [N, H]."""
        raise NotImplementedError
