"""Families whose pictures never enter the sequence: layers between those of the language model read them by cross-attention.

Whose picture a token sees is a place, not a mask: tokens that see the same one stand in a row (the last picture before them, inside their
sample), so attention runs row by row over one picture's vectors, and a pack costs what its samples cost alone. A token that sees none goes
through the same layers with what attention gives set to zero; in a pack without pictures these read a blank one, so that every tensor that
trains gets its gradient, which is then zero.

Shape letters: L tokens, I pictures, n vectors of a picture, E their width, B prompts.
"""

from __future__ import annotations

import bisect
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
class Run:
    """Neighbouring tokens that see the same vectors: places [start, end), and [from, to) of the vectors of all pictures in a row."""

    start: int
    end: int
    spans: tuple[tuple[int, int], ...]


@dataclass
class Crossing:
    """What the layers between are told of a pack's pictures."""

    states: torch.Tensor  # [I, n, E]
    runs: Sequence[Run]
    gate: torch.Tensor  # float [1, L]: 0 where a token sees no picture
    weight: torch.Tensor | None = None  # float [L]: what attention gives is multiplied by it, where the class has no gate for that
    kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # keys and values of each layer, where decoding goes on with them

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """query [1, H, L, D], key and value [1, K, I * n, D] -> [1, L, H, D]: each run over its own vectors."""
        if self.kept is not None:
            self.kept.append((key, value))
        outputs = []
        for run in self.runs:
            q, k, v = query[:, :, run.start : run.end], _cut(key, run.spans), _cut(value, run.spans)
            outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]))
        out = torch.cat(outputs, dim=2).transpose(1, 2)
        return out if self.weight is None else out * self.weight[None, :, None, None].to(out.dtype)


def _cut(vectors: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    pieces = [vectors[:, :, start:end] for start, end in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def runs_at(runs: Sequence[Run], places: Sequence[int]) -> list[Run]:
    """The run in which each place lies."""
    ends = [run.end for run in runs]
    return [runs[bisect.bisect_right(ends, place)] for place in places]


def prompt_ends(options: Mapping[str, Any]) -> list[int]:
    """Places of the last token of each prompt that a prefill is told of: what is generated behind it sees the same pictures."""
    return [unit.start + unit.prompt - 1 for unit in options["prompt_units"]]


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
        if batch.image_facts is not None:
            states = self.features(model, self.normalised(batch.pixels, batch.dtype), batch.image_facts).pooled
        else:
            states = self.features(model, *self.blank(batch.device, self.compute_dtype(model))).pooled
        crossing = self.crossing(states, batch, ids, self.image_id(model.config))
        return self.run_language(model, embeddings, batch.position_ids, {**attention, "crossing": crossing})

    def crossing(self, states: torch.Tensor, batch: DeviceBatch, ids: np.ndarray, image_id: int) -> Crossing:
        """Whose vectors each token of a pack sees; this default: the last picture before it."""
        pictures, count = last_pictures(ids, image_id, batch.boundaries), states.shape[1]
        runs = [Run(start, end, ((number * count, (number + 1) * count),)) for start, end, number in runs_of(pictures)]
        gate = torch.from_numpy((pictures >= 0).astype(np.float32)).to(batch.device)[None]
        return Crossing(states, runs, gate)


def runs_of_rows(prompts: torch.Tensor, tokens: int) -> list[tuple[int, int, int]]:
    """While decoding: (start, end, prompt) of neighbouring tokens, as many of each row; `prompts` [R] is the prompt of each."""
    return runs_of(np.repeat(prompts.cpu().numpy(), tokens // len(prompts)))
