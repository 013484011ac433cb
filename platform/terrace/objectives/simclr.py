"""SimCLR: each view among all views of the batch, where the other view of its picture is the right one (NT-Xent).

    loss of a picture = 1/2 sum over its two views a of [ logsumexp over all other views b of z_a.z_b / t  -  z_a.z_a' / t ]

z are the projector's vectors, of length 1, and a' is the other view of the same picture. The loop divides by the pictures of the global
batch.
"""

from __future__ import annotations

from typing import Any

import torch

from terrace.objectives.self_supervised import Seen, Told, ViewsObjective, unit


class Simclr(ViewsObjective):
    name = "simclr"

    def losses(self, heads: Any, seen: Seen) -> Told:
        vectors = unit(heads.projected(seen.features))
        return Told(contrasted(vectors, self.options.temperature), vectors)


open_objective = Simclr


def contrasted(vectors: torch.Tensor, temperature: float) -> torch.Tensor:
    """[N] of vectors [N, 2, D]."""
    count = len(vectors)
    rows = vectors.transpose(0, 1).reshape(2 * count, -1)  # all first views, then all second ones
    logits = rows @ rows.T / temperature
    right = logits.diagonal(count)
    logits = logits.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=rows.device), -torch.inf)
    return logits.logsumexp(1).view(2, count).mean(0) - right
