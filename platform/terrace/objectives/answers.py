"""Answers to prompts as packs, and the log-probability that a model gives each of them.

A row is one unit (models.shared_prompt): the prompt and its images run once for all of its answers. The log-probability of
an answer is the sum over its tokens with the end mark. Rows of logits exist `chunk_tokens` at a time and are computed again
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from terrace.data.types import PackedExample
from terrace.models.batch import DeviceBatch, to_device
from terrace.models.families.registry import output_layer
from terrace.models.shared_prompt import Unit, units_hidden
from terrace.objectives.grpo import token_logprobs
from terrace.objectives.lm import empty_pack


@dataclass(frozen=True)
class AnswerPack:
    """Rows laid out as units of one pack, on the host. R rows, A answers, M tokens of answers."""

    pack: PackedExample
    units: list[Unit]
    predicting: list[int]  # M: the place in the pack whose logits predict the token
    tokens: np.ndarray  # int64 [M]
    lengths: list[int]  # A: tokens of each answer
    wanted: list[bool]  # A: whether the answer is to become more likely; of a pair True, False
    answers: list[int]  # R: answers of each row
    names: list[str]  # R: source, row and sample id
    sources: list[str]  # R
    rows: int  # of the pack that are filled
    visual_tokens: int
    mismatched: AnswerPack | None = None  # the same prompts with the answer to another one (kto's divergence)


@dataclass
class AnswerBatch:
    """An AnswerPack on the device. `results` is filled by the loss."""

    batch: DeviceBatch
    units: list[Unit]
    predicting: torch.Tensor  # int64 [M]
    tokens: torch.Tensor  # int64 [M]
    lengths: list[int]
    wanted: torch.Tensor  # bool [A]
    reference: torch.Tensor | None = None  # float32 [A]; None: only log-probabilities are asked for
    results: dict[str, torch.Tensor] = field(default_factory=dict)


def empty_answers() -> AnswerPack:
    return AnswerPack(empty_pack(), [Unit(0, 1)], [], np.zeros(0, np.int64), [], [], [], [], [], 0, 0)


def answer_batch(pack: AnswerPack, reference: Sequence[float] | None, device: torch.device | str, dtype: torch.dtype) -> AnswerBatch:
    """One pack on the device."""
    return AnswerBatch(
        batch=to_device(pack.pack, device, dtype),
        units=pack.units,
        predicting=torch.tensor(pack.predicting, dtype=torch.int64, device=device),
        tokens=torch.from_numpy(pack.tokens).to(device),
        lengths=pack.lengths,
        wanted=torch.tensor(pack.wanted, dtype=torch.bool, device=device),
        reference=None if reference is None else torch.tensor(reference, dtype=torch.float32, device=device),
    )


def answer_logprobs(model: Any, batch: AnswerBatch, chunk_tokens: int) -> torch.Tensor:
    """float32 [A]: log-probability of each answer. Without answers [0], but it hangs on the model: ranks run the same collectives."""
    hidden = units_hidden(model, batch.batch, batch.units)
    if not batch.lengths:
        return output_layer(model)(hidden[:1]).float().sum().expand(1)[:0]
    selected = hidden.index_select(0, batch.predicting)
    again = torch.is_grad_enabled() and len(selected) > chunk_tokens
    found = []
    for rows, tokens in zip(selected.split(chunk_tokens), batch.tokens.split(chunk_tokens)):
        found.append(
            checkpoint(_row_logprobs, model, rows, tokens, use_reentrant=False) if again else _row_logprobs(model, rows, tokens)
        )
    return torch.stack([answer.sum() for answer in torch.cat(found).split(batch.lengths)])


def _row_logprobs(model: Any, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return token_logprobs(output_layer(model)(rows).float(), tokens, 1.0)
