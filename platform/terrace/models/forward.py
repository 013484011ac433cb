"""One pack through the model, whatever its family: segments kept apart, or units of a prompt and its responses.

The forward pass itself is `FamilyModel.hidden`; here stands what attention is told in each case.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from terrace.errors import DamagedData
from terrace.families.configurations import language_config
from terrace.models.batch import DeviceBatch
from terrace.models.families.registry import family_of_model, output_layer


def check_placeholders(batch: DeviceBatch, visual_ids: tuple[int, ...], vocabulary: int) -> None:
    """Raise DamagedData if the image tokens of the pack are not as many as its images give, or a token lies behind the vocabulary."""
    example = batch.example
    if example.tokens and (largest := int(example.input_ids.max())) >= vocabulary:
        raise DamagedData(
            f"pack {example.pack} has the token {largest} and the model of this stage {vocabulary} rows (samples"
            f" {', '.join(example.sample_ids)}): what model_changes.add_tokens adds later cannot be read before"
        )
    tokens = int(np.isin(example.input_ids, visual_ids).sum())
    if tokens != example.visual_tokens:
        raise DamagedData(
            f"pack {example.pack} has {tokens} image tokens and images for {example.visual_tokens} "
            f"(samples {', '.join(example.sample_ids)}): index and shards disagree, ingest this source again"
        )


def hidden_states(model: Any, batch: DeviceBatch, **attention: Any) -> torch.Tensor:
    """Hidden states [L, hidden] of a pack after the final norm (with sequence parallelism: of this rank's tokens).

    `model` is the transformers class itself, not a wrapper; `attention` is what its attention functions are told.
    """
    family = family_of_model(model)
    check_placeholders(batch, family.visual_ids(model.config), language_config(model.config).vocab_size)
    return family.hidden(model, batch, attention)


def pack_hidden(model: Any, batch: DeviceBatch) -> torch.Tensor:
    """`hidden_states` of a pack whose segments never see each other."""
    options: dict[str, Any] = {"sequence_group": batch.sequence.group} if batch.sequence is not None else {}
    return hidden_states(
        model, batch, cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_seqlens, max_length_q=batch.longest,
        max_length_k=batch.longest, segment_boundaries=batch.boundaries, **options,
    )  # fmt: skip


def pack_logits_hidden(model: Any, batch: DeviceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [L, vocabulary], hidden [L, hidden]) of a pack. For tests and small evaluations: all logits exist at once."""
    hidden = pack_hidden(model, batch)
    return output_layer(model)(hidden), hidden
