"""Families whose pictures never enter the sequence: layers between those of the language model read them by cross-attention.

Whose picture a token sees is a place, not a mask: tokens that see the same one stand in a row (the last picture before them, inside their
sample), so attention runs row by row over one picture's vectors, and a pack costs what its samples cost alone. A token that sees none goes
through the same layers with what attention gives set to zero; in a pack without pictures these read a blank one, so that every tensor that
trains gets its gradient, which is then zero.

Shape letters: L tokens, I pictures, n vectors of a picture, E their width, B prompts.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from terrace.models.batch import DeviceBatch
from terrace.models.families.interface import FamilyModel

BESIDE = -1  # where, among the layers that a prefill keeps, what decoding needs of the prompts' pictures stands


@dataclass(frozen=True)
class Crossing:
    """What the layers between are told of a pack's pictures."""

    states: torch.Tensor  # [I, n, E]
    runs: Sequence[tuple[int, int, int]]  # (start, end, picture) of neighbouring tokens
    gate: torch.Tensor  # float [1, L]: 0 where a token sees no picture

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """query [1, H, L, D], key and value [1, K, I * n, D] -> [1, L, H, D]: each run over its own picture."""
        count, outputs = self.states.shape[1], []
        for start, end, picture in self.runs:
            seen = slice(picture * count, (picture + 1) * count)
            q, k, v = query[:, :, start:end], key[:, :, seen], value[:, :, seen]
            outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def last_pictures(input_ids: np.ndarray, image_id: int, boundaries: Sequence[int]) -> np.ndarray:
    """int64 [L]: the last picture at or before each token inside its segment, -1 for none."""
    shown = np.cumsum(input_ids == image_id) - 1
    before = np.concatenate([[0], shown + 1])  # pictures in front of each place
    first = np.concatenate([np.full(end - start, before[start]) for start, end in itertools.pairwise(boundaries)])
    return np.where(shown >= first, shown, -1)


def runs_of(pictures: np.ndarray) -> list[tuple[int, int, int]]:
    """Neighbouring tokens of one picture; those of none read the first, and their gate is shut."""
    cuts = [0, *(np.flatnonzero(np.diff(pictures)) + 1).tolist(), len(pictures)]
    return [(start, end, max(0, int(pictures[start]))) for start, end in itertools.pairwise(cuts) if end > start]


class CrossingModel(FamilyModel):
    """`hidden` without placeholders to fill; a family says how its layers run, in `run_language`, with the option `crossing`."""

    @abstractmethod
    def image_id(self, config: Any) -> int:
        """The token id of a picture's placeholder."""

    def visual_ids(self, config: Any) -> tuple[int, ...]:
        return (self.image_id(config),)

    def places(self, input_ids: torch.Tensor, config: Any) -> torch.Tensor:
        return input_ids == self.image_id(config)

    def hidden(self, model: Any, batch: DeviceBatch, attention: Mapping[str, Any]) -> torch.Tensor:
        embeddings = self.language(model).embed_tokens(batch.input_ids)
        ids = batch.example.input_ids if batch.example.tokens else np.zeros(1, np.int32)
        pictures = last_pictures(ids, self.image_id(model.config), batch.boundaries)
        if batch.image_facts is not None:
            states = self.features(model, self.normalised(batch.pixels, batch.dtype), batch.image_facts).pooled
        else:
            states = self.features(model, *self.blank(batch.device, self.compute_dtype(model))).pooled
        gate = torch.from_numpy((pictures >= 0).astype(np.float32)).to(batch.device)[None]
        crossing = Crossing(states, runs_of(pictures), gate)
        if (keep := attention.get("keep")) is not None:
            last = pictures[np.asarray(batch.boundaries[1:]) - 1]
            chosen = torch.from_numpy(np.maximum(last, 0)).to(batch.device)
            keep[BESIDE] = (states[chosen], torch.from_numpy((last >= 0).astype(np.float32)).to(batch.device))
        return self.run_language(model, embeddings, batch.position_ids, {**attention, "crossing": crossing})

    def beside(self, rows: Any) -> Crossing:
        """The same while decoding: one token of each row, `rows` the cache's (states [B, n, E], gates [B], prompt of each row)."""
        states, gates, prompts = rows
        return Crossing(states, runs_of(prompts.cpu().numpy()), gates[prompts][None])
