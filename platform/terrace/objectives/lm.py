"""Next-token prediction: the cross-entropy summed over the supervised tokens of a pack.

The sum is not divided here. The loop divides by the supervised tokens of the whole global batch, so that neither
packing nor accumulation nor the number of ranks can change the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from terrace.data.order.balance import CostModel, cost_of
from terrace.data.types import PackedExample, no_pixels
from terrace.models.batch import DeviceBatch, to_device
from terrace.models.families.registry import family_model, output_layer
from terrace.models.forward import pack_hidden
from terrace.models.sequence_parallel import shard_to_device
from terrace.objectives.experts import ExpertBalance, open_balance
from terrace.objectives.interface import Counts, Objective, Opening, StageRun, StepExamples
from terrace.worker.context import data_place


class LanguageModelling(Objective):
    """Packs of the data path."""

    measured = True

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._cost = cost_of(opening.recipe.model)
        self._experts: ExpertBalance | None = None

    def begin(self, run: StageRun) -> None:
        super().begin(run)
        self._experts = open_balance(self.opening, self.strategy.model)

    def loss(self, model: Any, batch: DeviceBatch) -> torch.Tensor:
        def plain() -> torch.Tensor:
            z_loss = self.opening.stage.z_loss if model.training else 0.0  # held-out losses are without
            return summed_loss(model, batch, self.opening.stage.loss_chunk_tokens, z_loss)

        return self._experts.loss(model, batch, plain) if self._experts else plain()

    def before(self, examples: Sequence[PackedExample], scale: float) -> None:
        if self._experts:
            self._experts.before(
                examples, scale, lambda example: self.strategy.loss(self.batch(example)), lambda example: len(example.segment_ends)
            )

    def values(self, ran: bool) -> dict[str, Any]:
        return self._experts.values(ran) if self._experts else {}

    def weight(self, example: PackedExample) -> float:
        return example.supervised_tokens

    def count(self, taken: StepExamples) -> Counts:
        return count_packs(taken.examples, sorted(self.opening.stage.mixture.weights), self._cost)

    def batch(self, example: PackedExample) -> DeviceBatch:
        """A pack on this rank's device: the whole of it, or this rank's part in its group."""
        opening, config = self.opening, self.opening.feed.config
        if opening.sequence is None:
            return to_device(example, opening.context.device, opening.dtype)
        visual_ids = family_model(config).visual_ids(config)
        return shard_to_device(example, visual_ids, opening.context.device, opening.dtype, opening.sequence)

    def empty(self) -> PackedExample:
        return empty_pack()

    def pack_of(self, example: PackedExample) -> PackedExample:
        return example

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Mean loss per supervised token of each kind of held-out samples. `feed.held_out` is the same on every rank; each
        evaluates its share, or with sequence parallelism its group's."""
        alive()
        if self._experts:
            self._experts.rest()
        packs, strategy, sequence = self.opening.feed.held_out, self.strategy, self.opening.sequence
        strategy.model.eval()
        group_rank, groups = data_place(self.opening.context, sequence.size if sequence else 1)
        losses = {}
        for kind in sorted(packs):
            loss_sum, tokens = 0.0, 0
            rounds = -(-len(packs[kind]) // groups)
            for turn in range(rounds):
                place = turn * groups + group_rank
                pack = packs[kind][place] if place < len(packs[kind]) else empty_pack()
                loss_sum += float(strategy.loss(self.batch(pack)))
                tokens += pack.supervised_tokens if sequence is None or sequence.rank == 0 else 0
                alive()
            total = self.opening.gather([loss_sum, float(tokens)]).sum(axis=0)
            if total[1]:
                losses[kind] = float(total[0] / total[1])
        strategy.model.train()
        return losses


open_objective = LanguageModelling


def summed_loss(model: Any, batch: DeviceBatch, chunk_tokens: int, z_loss: float = 0.0) -> torch.Tensor:
    """Float32 scalar. Only supervised rows meet the output layer: image tokens and prompts cost no logits."""
    hidden = pack_hidden(model, batch)
    return output_layer(model)(hidden.index_select(0, batch.supervised_rows), batch.targets, chunk_tokens, z_loss)


def count_packs(packs: list[PackedExample], sources: list[str], cost: CostModel) -> Counts:
    """What packs of the data path hold, per source of the mixture."""
    tokens = sum(pack.tokens for pack in packs)
    return Counts(
        supervised_tokens=sum(pack.supervised_tokens for pack in packs),
        tokens=tokens,
        samples=sum(len(pack.sample_ids) for pack in packs),
        visual_tokens=sum(pack.visual_tokens for pack in packs),
        rows=tokens,
        cost=sum(pack_cost(pack, cost) for pack in packs),
        damaged_samples=sum(len(pack.damaged) for pack in packs),
        replaced_samples=sum(pack.replaced for pack in packs),
        samples_per_source={source: sum(pack.sources.count(source) for pack in packs) for source in sources},
    )


def pack_cost(pack: PackedExample, model: CostModel) -> float:
    """Multiply-adds of a pack's forward pass, as the dealing of packs to ranks estimates them."""
    lengths = np.diff(np.asarray(pack.segment_ends, np.float64), prepend=0.0)
    text = model.per_token * lengths.sum() + model.per_token_pair * (lengths**2).sum()
    return float(text + model.per_row * len(pack.pixels))


def empty_pack(pack: int = -1, sequence_length: int = 1) -> PackedExample:
    """A pack without tokens: it counts nothing and runs the same collectives as any other."""
    return PackedExample(
        pack=pack,
        input_ids=np.zeros(0, np.int32),
        targets=np.zeros(0, np.int32),
        position_ids=np.zeros((0, 0), np.int32),
        segment_ends=np.zeros(0, np.int32),
        **no_pixels(0, 0),
        sample_ids=[],
        sources=[],
        kinds=[],
        sequence_length=sequence_length,
    )
