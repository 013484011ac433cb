"""BLIP-2's first stage with torch: transformers' retrieval class, a temperature, and an output layer for the Q-Former's own text.

The Q-Former runs in three ways over [queries, text], and only what sees what differs: text alone (contrast), all see all (matching),
and text that sees the queries and what stands before it (writing), while queries never see text. In one pass with such a mask the
queries are those of the picture alone, so it equals the published pass over kept keys and values.

Shape letters: B pairs, P patches, Q queries, L tokens of a text, W width of the Q-Former, D common width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, Blip2Config, Blip2ForImageTextRetrieval

from terrace.families.blip_2_matching import Blip2Matching
from terrace.models.families.two_towers import TwoTowersModel
from terrace.recipe.schema import PartName

TEMPERATURE = 0.07  # as published, where it starts


class Blip2MatchingConfig(Blip2Config):
    """Blip2Config under a name of its own: the two classes of BLIP-2 share transformers' model type."""

    model_type = "blip_2_matching"


AutoConfig.register(Blip2MatchingConfig.model_type, Blip2MatchingConfig, exist_ok=True)


class TextHead(nn.Module):
    """BERT's output layer: its matrix is the words' own embedding."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words, self.bias)


class Blip2MatchingForTraining(Blip2ForImageTextRetrieval):
    config_class = Blip2MatchingConfig

    def __init__(self, config: Blip2MatchingConfig) -> None:
        super().__init__(config)
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        self.text_head = TextHead(config.qformer_config)


class Blip2MatchingModel(TwoTowersModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("vision_model.", "vision"), ("", "projector"))
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "vision_model.encoder.layers"}
    embedding: ClassVar[str] = "embeddings.word_embeddings.weight"
    mean = Blip2Matching.mean
    std = Blip2Matching.std
    first_patches = 1

    def skeleton(self, config: Any) -> Any:
        with_words(config)
        return Blip2MatchingForTraining(config)

    def exported_config(self, config: Any) -> Any:
        """Of the published class."""
        config = copy.deepcopy(config)
        with_words(config)
        values = config.to_dict() | {"model_type": Blip2Config.model_type, "architectures": [Blip2ForImageTextRetrieval.__name__]}
        return Blip2Config.from_dict(values)

    def initial(self, name: str, config: Any, shape: torch.Size) -> torch.Tensor | None:
        """The class starts all queries at zero: equal, they would stay equal. The published code draws them."""
        if name == "query_tokens":
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * config.qformer_config.initializer_range
        return {"temperature": torch.full(shape, TEMPERATURE), "text_head.bias": torch.zeros(shape)}.get(name)

    def may_be_new(self, name: str) -> bool:
        return name == "temperature" or name.startswith("text_head.")  # which published checkpoints of the class lack

    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        return []

    # ------------------------------------------------------------ what it computes

    def seen(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """[B, P + 1, .]: what the tower gives for pictures [B, 3, side, side]."""
        return model.vision_model(pixel_values=pixels, return_dict=True).last_hidden_state

    def query_vectors(self, model: Any, seen: torch.Tensor) -> torch.Tensor:
        """[B, Q, D] of pictures, each vector of length 1."""
        queries = model.query_tokens.expand(len(seen), -1, -1)
        hidden = model.qformer(query_embeds=queries, encoder_hidden_states=seen, return_dict=True).last_hidden_state
        return F.normalize(model.vision_projection(hidden), dim=-1)

    def caption_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, D] of texts [B, L], each of length 1: the Q-Former over text alone, read at its first token."""
        words = model.embeddings(input_ids=ids)
        hidden = model.qformer(query_embeds=words, query_length=0, attention_mask=mask, return_dict=True).last_hidden_state
        return F.normalize(model.text_projection(hidden[:, 0]), dim=-1)

    def match_logits(self, model: Any, seen: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, 2]: no match, match. Queries and text see each other; the mean over queries."""
        queries = model.query_tokens.expand(len(seen), -1, -1)
        everything = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)
        hidden = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries), query_length=queries.shape[1], attention_mask=everything,
            encoder_hidden_states=seen, return_dict=True,
        ).last_hidden_state  # fmt: skip
        return model.itm_head(hidden[:, : queries.shape[1]]).mean(dim=1)

    def written_logits(self, model: Any, seen: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, L, words]: of the token after each of a text that sees the queries and what stands before it."""
        queries = model.query_tokens.expand(len(seen), -1, -1)
        count, length = queries.shape[1], ids.shape[1]
        visible = torch.zeros(len(ids), 1, count + length, count + length, dtype=torch.bool, device=ids.device)
        visible[:, :, :, :count] = True
        visible[:, :, count:, count:] = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril() & mask.bool()[:, None, None]
        hidden = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries), query_length=count, attention_mask=visible,
            encoder_hidden_states=seen, return_dict=True,
        ).last_hidden_state  # fmt: skip
        return model.text_head(hidden[:, count:], model.embeddings.word_embeddings.weight)


def with_words(config: Any) -> None:
    """The Q-Former has the run's vocabulary and padding."""
    config.qformer_config.vocab_size = config.text_config.vocab_size
    config.qformer_config.pad_token_id = config.text_config.pad_token_id


MODEL = Blip2MatchingModel
