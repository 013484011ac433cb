"""Multi-token prediction: the model's own loss and the weighted mean of those of blocks that see hidden state and next embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from terrace.models.batch import DeviceBatch
from terrace.models.families.registry import output_layer
from terrace.models.heads import mtp_hidden
from terrace.objectives.heads import Ahead, HeadsObjective, ahead
from terrace.objectives.interface import Opening, StepExamples
from terrace.recipe.schema_heads import MtpOptions


class Mtp(HeadsObjective):
    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.mtp or MtpOptions()
        self._weight = self._options.weight

    def weights(self) -> list[float]:
        depth = self._options.depth
        return [self._weight / depth] * depth

    def steps(self, start: int) -> Iterator[StepExamples]:
        switch = self._options.switch * self.opening.feed.total_steps
        for taken in super().steps(start):
            self._weight = self._options.weight if taken.step < switch else self._options.later_weight
            yield taken

    def outputs(self, model: Any, batch: DeviceBatch, hidden: torch.Tensor) -> list[tuple[Ahead, torch.Tensor, Any]]:
        found, tokens = [], batch.input_ids[0]
        attention = {
            "cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens, "max_length_q": batch.longest,
            "max_length_k": batch.longest, "segment_boundaries": batch.boundaries,
        }  # fmt: skip
        for depth in range(1, self._options.depth + 1):
            # The last rows of a segment get tokens of the next one: nothing before them sees these rows, and no target is theirs.
            tokens = tokens.roll(-1)
            hidden = mtp_hidden(model, depth, hidden, tokens, batch.position_ids, attention)
            what = ahead(batch, depth)
            found.append((what, hidden.index_select(0, what.rows), output_layer(model)))
        return found


open_objective = Mtp
