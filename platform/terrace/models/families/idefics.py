"""Idefics with torch: the class's layers one by one, each gated layer with the row of tokens that each picture is seen by.

The class's own forward takes a mask over all tokens and all pictures' latents, and runs the language model with a mask of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from terrace.errors import InputError
from terrace.models.batch import ImageFacts
from terrace.models.families.crossing import CrossingModel
from terrace.models.families.interface import Features
from terrace.recipe.schema import PartName

ADDED = {  # stored beside the matrices that hold the published vocabulary, for the marks of pictures -> here rows of the same
    "model.embed_tokens.additional_embedding.weight": "model.embed_tokens.weight", "lm_head.additional_fc.weight": "lm_head.weight"
}  # fmt: skip


class IdeficsModel(CrossingModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.vision_model.", "vision"),
        ("model.perceiver_resampler.", "projector"),
        ("model.gated_cross_attn_layers.", "projector"),
        ("model.", "language"),
        ("lm_head.", "language"),
    )
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "model.vision_model.encoder.layers", "language": "model.layers"}
    embedding: ClassVar[str] = "model.embed_tokens.weight"

    def skeleton(self, config: Any) -> Any:
        if config.additional_vocab_size:
            raise InputError("idefics: additional_vocab_size must be 0 here: write `config`, with it added to vocab_size, and `init`")
        config.freeze_text_layers = config.freeze_vision_layers = config.freeze_lm_head = False  # what trains, a stage says
        return super().skeleton(config)

    def canonical_name(self, name: str) -> str:
        return ADDED.get(name, name)

    def joined(self, name: str, pieces: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
        return torch.cat([pieces[stored] for stored in sorted(pieces, key=lambda stored: stored in ADDED)])

    def unused(self, config: Any, names: Any) -> list[str]:
        """The norm behind the tower is for a class token that nobody takes."""
        return [name for name in names if name.startswith("model.vision_model.post_layernorm.")]

    def image_id(self, config: Any) -> int:
        return int(config.image_token_id)

    def vision(self, model: Any) -> Any:
        return model.model.vision_model

    def language(self, model: Any) -> Any:
        return model.model

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        seen = model.model.vision_model(**self.inputs(values, images)).last_hidden_state
        return Features(model.model.perceiver_resampler(seen))

    def run_language(self, model: Any, embeddings: torch.Tensor, positions: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        options = dict(options)
        crossing = options.pop("crossing", None) or self.beside(options["decode"].beside)
        inner, hidden = model.model, embeddings
        states = crossing.states.flatten(0, 1)[None].to(hidden.dtype)
        for number, layer in enumerate(inner.layers):
            if number % inner.cross_layer_interval == 0:
                hidden = inner.gated_cross_attn_layers[number // inner.cross_layer_interval](
                    hidden, None, states, cross_attention_gate=crossing.gate, crossing=crossing
                )
            hidden = layer(hidden, attention_mask=None, position_ids=positions[0], **options)
        return inner.norm(hidden)[0]


MODEL = IdeficsModel
