"""SigLIP: every picture with every text of the whole batch is a question of its own, a pair or none.

    loss = - sum over i, j of log sigmoid(z_ij (s x_i.y_j + b)),  z = 1 for a pair and -1 otherwise

with s = exp(logit_scale) from 10 and b from -10, both learned. The loop divides by the pairs of the global batch. Texts go
round the ring of ranks, each time to the next one, with the slopes that they have gathered, until they are back: a rank holds
its own vectors and a neighbour's, never everybody's, and one block of the matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from terrace.objectives.two_towers import Share, TwoTowersObjective
from terrace.worker.collectives import gather_rows, pass_on
from terrace.worker.context import WorkerContext

LOGITS_AT_ONCE = 2**26  # numbers of a block of rows


class Siglip(TwoTowersObjective):
    """See the module's docstring."""

    def share(self, vectors: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, context: WorkerContext) -> Share:
        return siglip_share(vectors, scale, torch.zeros_like(scale) if bias is None else bias, context)


open_objective = Siglip


def siglip_share(vectors: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor, context: WorkerContext) -> Share:
    """`vectors` [N, 2, D] of this rank."""
    counts = [int(count) for count in gather_rows([float(len(vectors))], context)[:, 0]]
    scale, pictures = log_scale.exp(), vectors[:, 0].contiguous()
    loss, of_scale, of_bias = (torch.zeros_like(pictures[:, 0]) for _ in range(3))
    of_pictures = torch.zeros_like(pictures)
    texts = vectors.new_zeros(max(counts), vectors.shape[2])  # the visitors, and behind them room up to the most of any rank
    texts[: len(vectors)] = vectors[:, 1]
    of_texts = torch.zeros_like(texts)
    for turn in range(context.world_size):
        count = counts[(context.rank - turn) % context.world_size]
        visitors = texts[:count]
        block = max(1, LOGITS_AT_ONCE // max(1, count))
        for start in range(0, len(pictures), block):
            rows = slice(start, start + block)
            similar = scale * pictures[rows] @ visitors.T
            logits = similar + bias
            signs = torch.full_like(logits, -1.0)
            if turn == 0:
                signs.diagonal(start).fill_(1.0)
            loss[rows] -= F.logsigmoid(signs * logits).sum(1)
            slope = -signs * torch.sigmoid(-signs * logits)
            of_scale[rows] += (slope * similar).sum(1)
            of_bias[rows] += slope.sum(1)
            of_pictures[rows] += scale * (slope @ visitors)
            of_texts[:count] += scale * (slope.T @ pictures[rows])
        texts, of_texts = pass_on([texts, of_texts], context)
    return Share(loss, torch.stack([of_pictures, of_texts[: len(vectors)]], dim=1), of_scale, of_bias)
