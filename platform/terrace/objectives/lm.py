"""Next-token prediction: the cross-entropy summed over the supervised tokens of a pack.

The sum is not divided here. The loop divides by the supervised tokens of the whole global batch, so that neither
packing nor accumulation nor the number of ranks can change the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from terrace.models.batch import DeviceBatch
from terrace.models.forward import pack_hidden


def summed_loss(model: Any, batch: DeviceBatch, chunk_tokens: int) -> torch.Tensor:
    """Float32 scalar. Only supervised rows meet the output layer: image tokens and prompts cost no logits."""
    hidden = pack_hidden(model, batch)
    return model.lm_head(hidden.index_select(0, batch.supervised_rows), batch.targets, chunk_tokens)


def lm_objective(chunk_tokens: int) -> Callable[[Any, DeviceBatch], torch.Tensor]:
    """`loss(model, batch)` with the recipe's `loss_chunk_tokens` filled in."""

    def loss(model: Any, batch: DeviceBatch) -> torch.Tensor:
        return summed_loss(model, batch, chunk_tokens)

    return loss
