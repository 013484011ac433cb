"""Masked language modelling (BERT): the cross-entropy summed over the tokens that a sample is asked for.

    loss = sum over chosen tokens of -log p(token | the sample with its chosen tokens masked, replaced or left)

The loop divides by the chosen tokens of the whole global batch, as transformers' classes do by those of theirs. Which tokens are chosen
and what is read for them stands in `masked_tokens`; held-out samples have the same ones at every evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from terrace.data.tokenizer import load_tokenizer
from terrace.models.batch import DeviceBatch
from terrace.models.families.registry import family_model, family_of_model, output_layer
from terrace.models.forward import pack_hidden
from terrace.objectives.interface import Opening, StepExamples
from terrace.objectives.lm import LanguageModelling, empty_pack
from terrace.objectives.masked_tokens import Masking
from terrace.recipe.schema_mlm import MlmOptions


class MaskedLanguageModelling(LanguageModelling):
    """Packs of the data path, masked on the host before they are counted."""

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        feed, stage = opening.feed, opening.stage
        assert feed.tokenizer_dir is not None, "a stage on texts has a tokenizer"
        family = family_model(feed.config).family
        self._masking = Masking.of(stage.mlm or MlmOptions(), stage.seed, load_tokenizer(feed.tokenizer_dir), family)
        self._right = 0

    def steps(self, start: int) -> Iterator[StepExamples]:
        for taken in super().steps(start):
            yield replace(taken, examples=[self._masking.pack(pack) for pack in taken.examples])

    def loss(self, model: Any, batch: DeviceBatch) -> torch.Tensor:
        rows, chunk_tokens = asked_rows(model, batch), self.opening.stage.loss_chunk_tokens
        if not model.training:
            self._right += right_tokens(output_layer(model), rows, batch.targets)
        return output_layer(model)(rows, batch.targets, chunk_tokens)

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Mean loss of a chosen token of each kind of held-out samples, and the share that is told right."""
        alive()
        context, found = self.opening.context, {}
        self.strategy.model.eval()
        for kind, packs in sorted(self.opening.feed.held_out.items()):
            loss, tokens, self._right = 0.0, 0, 0
            for start in range(0, len(packs), context.world_size):
                place = start + context.rank
                pack = self._masking.pack(packs[place]) if place < len(packs) else empty_pack()
                loss += float(self.strategy.loss(self.batch(pack)))
                tokens += pack.supervised_tokens
                alive()
            total = self.opening.gather([loss, float(tokens), float(self._right)]).sum(axis=0)
            if total[1]:
                found |= {f"{kind}/loss": float(total[0] / total[1]), f"{kind}/accuracy": float(total[2] / total[1])}
        self.strategy.model.train()
        return found


open_objective = MaskedLanguageModelling


def asked_rows(model: Any, batch: DeviceBatch) -> torch.Tensor:
    """[N, H]: what the output layer reads of the N chosen tokens; no other token meets the head."""
    return family_of_model(model).before_head(model, pack_hidden(model, batch).index_select(0, batch.supervised_rows))


@torch.no_grad()
def right_tokens(head: Any, rows: torch.Tensor, targets: torch.Tensor) -> int:
    """How many of the chosen tokens the output layer holds for the likeliest. It runs once, as on every other rank."""
    return int((head(rows).argmax(1) == targets).sum())
