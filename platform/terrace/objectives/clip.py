"""CLIP: each picture among the texts of the whole batch, and each text among its pictures (symmetric InfoNCE).

    loss = 1/2 sum over pairs i of [ logsumexp_j s x_i.y_j - s x_i.y_i + logsumexp_j s x_j.y_i - s x_i.y_i ]

with the scale s = exp(logit_scale), learned from 1/0.07 and held at 100 or below. The loop divides by the pairs of the global
batch. A rank computes the rows of its own pictures and texts against everybody's; the other ranks' logsumexps, one number per
pair, tell it how its vectors move their rows, so that no matrix of gradients is ever exchanged.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from terrace.objectives.two_towers import Share, TwoTowersObjective
from terrace.worker.collectives import gather_rows, gather_tensors
from terrace.worker.context import WorkerContext

LOGITS_AT_ONCE = 2**26  # numbers of a block of rows


class Clip(TwoTowersObjective):
    """See the module's docstring."""

    def share(self, vectors: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, context: WorkerContext) -> Share:
        found = clip_share(vectors, scale, context)
        return found if bias is None else replace(found, bias=torch.zeros_like(found.scale))  # it moves a row's logits alike


open_objective = Clip


def clip_share(vectors: torch.Tensor, log_scale: torch.Tensor, context: WorkerContext) -> Share:
    """`vectors` [N, 2, D] of this rank."""
    counts = [int(count) for count in gather_rows([float(len(vectors))], context)[:, 0]]
    first, scale = sum(counts[: context.rank]), log_scale.exp()
    everything = gather_tensors(vectors, counts, context)
    sums = torch.empty_like(vectors[..., 0])  # [N, 2]: logsumexp of a picture's row, of a text's row
    block = max(1, LOGITS_AT_ONCE // max(1, len(everything)))
    for start in range(0, len(vectors), block):
        for side in (0, 1):
            sums[start : start + block, side] = (scale * vectors[start : start + block, side] @ everything[:, 1 - side].T).logsumexp(1)
    all_sums = gather_tensors(sums, counts, context)
    loss, slopes, of_scale = torch.zeros_like(sums[:, 0]), torch.zeros_like(vectors), torch.zeros_like(sums[:, 0])
    for start in range(0, len(vectors), block):
        rows = slice(start, start + block)
        own = torch.arange(first + start, first + min(start + block, len(vectors)), device=vectors.device)
        for side in (0, 1):
            keys = everything[:, 1 - side]
            logits = scale * vectors[rows, side] @ keys.T
            right = logits.gather(1, own[:, None])
            loss[rows] += 0.5 * (sums[rows, side] - right[:, 0])
            mine = (logits - sums[rows, side, None]).exp()
            of_scale[rows] += 0.5 * ((mine * logits).sum(1) - right[:, 0])
            theirs = (logits - all_sums[None, :, 1 - side]).exp()  # this vector in the rows of the other side
            slope = mine.add_(theirs).scatter_add_(1, own[:, None], torch.full_like(right, -2.0))
            slopes[rows, side] = 0.5 * scale * (slope @ keys)
    return Share(loss, slopes, of_scale)
