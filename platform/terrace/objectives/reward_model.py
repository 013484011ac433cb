"""Bradley-Terry: a chosen and a rejected answer to one prompt, and a score that prefers the chosen one.

    loss = -log sigmoid(score(prompt, chosen) - score(prompt, rejected)), summed over the pairs of a pack

The score is one linear map of the hidden state at the answer's last token. It is stored in the output row of a
placeholder, a token that no answer contains, so a reward model is a plain Hugging Face directory of the same class and
needs no head of its own. A pair is one unit (models.shared_prompt): the prompt and its images run once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from terrace.models.batch import DeviceBatch
from terrace.models.families.registry import family_of_model
from terrace.models.shared_prompt import Unit, units_hidden


@dataclass
class PairBatch:
    """Answers on the device; N of them, for training chosen and rejected by turns. `results` is filled by the loss."""

    batch: DeviceBatch
    units: list[Unit]
    rows: torch.Tensor  # int64 [N]: the place of each answer's last token
    results: dict[str, torch.Tensor] = field(default_factory=dict)


def score_token(model: Any) -> int:
    """The placeholder in whose output row the score lies: the family's last one."""
    return family_of_model(model).visual_ids(model.config)[-1]


def scores(model: Any, batch: PairBatch) -> torch.Tensor:
    """float32 [N]: the score of each answer."""
    hidden = units_hidden(model, batch.batch, batch.units)
    return model.lm_head(hidden.index_select(0, batch.rows)).float()[:, score_token(model)]


def summed_preference_loss(model: Any, batch: PairBatch) -> torch.Tensor:
    """Float32 scalar. A pack without pairs still runs the model, for the collectives."""
    if not len(batch.rows):
        return 0.0 * units_hidden(model, batch.batch, batch.units).float().sum()
    chosen, rejected = scores(model, batch).view(-1, 2).unbind(1)
    batch.results = {"margins": (chosen - rejected).detach()}
    return -F.logsigmoid(chosen - rejected).sum()


def preference_objective() -> Callable[[Any, PairBatch], torch.Tensor]:
    """`loss(model, batch)` for a strategy."""
    return summed_preference_loss


def answer_rows(units: list[Unit]) -> list[int]:
    """The place of every answer's last token in a pack of units."""
    rows = []
    for unit in units:
        end = unit.start + unit.prompt
        for length in unit.responses:
            end += length
            rows.append(end - 1)
    return rows
