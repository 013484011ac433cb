"""The load-balancing loss of a mixture of experts, over the whole global batch, and what its experts got to do.

The loss (Switch Transformer's, as transformers computes it) is the product of two means over all tokens of a batch: the
share of tokens that go to an expert, which has no gradient, and the mean probability that the router gives it. Means of
packs do not add up to it, so the shares of the whole global batch are counted first: with several packs on a rank by a
pass without gradient, with one pack by a sum over ranks between its forward and its backward. Given the shares, the
loss is linear in the probabilities, so that packing, accumulation and the number of ranks cannot change it. Image
tokens count as any other; padding and empty packs do not. A prompt that is computed once for several answers counts once.

A family whose balance is that of each sequence (DeepSeek-V3's form) needs no such pass: its losses add up, divided by
the sequences of the global batch; a prompt with its answers is one. A group of rollouts that is too long for one pack is split,
and its prompt then counts once in each part (rl.units).

Letters: M sparse layers, E experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from terrace.data.family import balance_weight
from terrace.families.configurations import language_config
from terrace.models.batch import DeviceBatch
from terrace.models.families.interface import Choice
from terrace.models.families.registry import family_of_model
from terrace.models.routing import heard, real_tokens, segment_numbers
from terrace.objectives.interface import Opening


def open_balance(opening: Opening, model: Any) -> ExpertBalance | None:
    """The stage's account of the model's routers, once the model is there; None where it has none."""
    family = family_of_model(model)
    return ExpertBalance(opening, family.family.balances_sequences) if family.routers(model) else None


class ExpertBalance:
    """One stage's account of its routers. Made when the model is there; only for a model that has routers."""

    def __init__(self, opening: Opening, by_sequence: bool) -> None:
        self._opening, self._by_sequence = opening, by_sequence
        self.weight = balance_weight(opening.recipe, opening.stage, opening.feed.config.to_dict())
        self._factor = 0.0  # of the loss per pack: its weight over the step's own scale
        self._shares: torch.Tensor | None = None  # float32 [E] over the global batch: assignments per token and layer
        self._tokens = 0.0  # of the global batch, counted once for each layer
        self._sequences = 0.0
        self._listens = False
        self._dropped: torch.Tensor | None = None  # assignments that experts left out, of this rank's packs
        self._counting = False
        self._counted: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None  # [M, E] of this rank's packs, in the backward pass
        self._balance = 0.0  # this rank's part of the unweighted loss

    def rest(self) -> None:
        """What follows is no step: losses are those of the text alone."""
        self._listens = False

    def before(
        self, batches: Sequence[Any], scale: float, measure: Callable[[Any], Any], sequences: Callable[[Any], int]
    ) -> None:
        """`batches` of a step; `measure(batch)` runs one forward without gradient through the strategy, `sequences(batch)` counts what
        it holds."""
        self._listens, self._counts, self._balance, self._shares, self._dropped = True, None, 0.0, None, None
        self._factor = self.weight / scale
        if not self.weight:
            return
        if self._by_sequence:
            held = sum(map(sequences, batches)) if self._first_of_its_group else 0
            self._sequences = float(self._opening.total([held])[0])
        elif len(batches) > 1:
            self._counting, self._counted = True, None
            for batch in batches:
                measure(batch)
            self._counting = False
            assert self._counted is not None
            self._agree(self._counted)

    @property
    def _first_of_its_group(self) -> bool:
        return self._opening.sequence is None or self._opening.sequence.rank == 0

    def loss(self, model: Any, batch: DeviceBatch, plain: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`plain()` with the pack's share of the balance, times what the step's divisor will take away again."""
        if not self._listens:
            return plain()
        with heard(model) as choices:
            total = plain()
        tokens = real_tokens(batch)
        counts = torch.stack([choice.counts(tokens) for choice in choices])
        if self._counting:
            self._counted = _added(self._counted, counts)
            return total
        self._counts = _added(self._counts, counts)
        if dropped := family_of_model(model).dropped(model):
            self._dropped = _added(self._dropped, torch.stack(dropped).sum())
        if not self.weight:
            return total
        if self._by_sequence:
            share = self._of_sequences(choices, batch)
        else:
            if self._shares is None:
                self._agree(counts)
            share = self._of_batch(choices, tokens)
        self._balance += float(share.detach())
        return total + self._factor * share

    def _agree(self, counts: torch.Tensor) -> None:
        """Shares of the global batch from this rank's counts [M, E]. Collective."""
        assigned = counts.sum(dim=0).double().cpu().numpy()
        whole = self._opening.total(assigned.tolist())
        self._tokens = max(1.0, float(whole.sum()) / self._per_token)
        self._shares = torch.from_numpy(whole / self._tokens).float().to(counts.device)

    def _of_batch(self, choices: Sequence[Choice], tokens: int) -> torch.Tensor:
        assert self._shares is not None
        probabilities = sum(choice.probabilities[:tokens].sum(dim=0) for choice in choices)
        return len(self._shares) * (self._shares * probabilities).sum() / self._tokens

    def _of_sequences(self, choices: Sequence[Choice], batch: DeviceBatch) -> torch.Tensor:
        """Sum over layers and sequences of E / (k T) * sum over experts of assignments * mean probability."""
        numbers = segment_numbers(batch)
        lengths = batch.cu_seqlens.diff().float()  # of whole sequences, whichever ranks hold them
        experts = choices[0].probabilities.shape[1]
        total = torch.zeros((), device=numbers.device)
        for choice in choices:
            chosen, sums = (torch.zeros(len(lengths), experts, device=numbers.device) for _ in range(2))
            assigned = choice.experts[: len(numbers)]
            chosen.index_put_((numbers[:, None].expand_as(assigned), assigned), torch.ones(1, device=numbers.device), accumulate=True)
            if batch.sequence is not None:
                dist.all_reduce(chosen, group=batch.sequence.group.group)
            sums = sums.index_add(0, numbers, choice.probabilities[: len(numbers)])
            total = total + ((chosen * sums).sum(dim=1) / lengths**2).sum() * experts / assigned.shape[1]
        return total / max(1.0, self._sequences)

    @property
    def _per_token(self) -> int:
        return int(language_config(self._opening.feed.config).num_experts_per_tok)

    def values(self, ran: bool) -> dict[str, Any]:
        """Metrics of the step, after its backward; none where it did not run. Collective."""
        self.rest()
        if not ran or self._counts is None:
            return {}
        layers, experts = self._counts.shape
        whole = self._opening.total([self._balance, *self._counts.double().flatten().cpu().tolist()])
        counts = whole[1:].reshape(layers, experts)
        assigned = counts.sum(axis=1)
        line: dict[str, Any] = {
            "expert_tokens": counts.sum(axis=0).astype(np.int64).tolist(),
            "expert_fullest_share": float((counts.max(axis=1) / np.maximum(assigned, 1)).max()),
        }
        if self._dropped is not None:
            left_out = float(self._opening.total([float(self._dropped)])[0])
            line["expert_dropped_share"] = left_out / max(1.0, float(assigned.sum()))
        if self.weight:
            line["expert_balance_loss"] = float(whole[0])
        return line


def _added(so_far: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    return counts if so_far is None else so_far + counts
