"""Contrastive predictive coding: a view is cut into a grid of overlapping squares, and what lies above tells what lies below.

    loss of a picture = mean over rows i, columns j and k = 1 .. `ahead` of -log softmax_s((W_k c_ij).z_s / t) of its own s = (i + k, j),
    s being all squares of the batch

z are the projector's vectors of single squares, each of which the tower sees alone; c_ij is the state of a recurrent unit that read
column j from the top down to row i.
"""

from __future__ import annotations

from typing import Any

import torch

from terrace.objectives.self_supervised import Seen, Told, Views, ViewsObjective, unit, wide


class Cpc(ViewsObjective):
    name = "cpc"

    def shown(self, views: Views) -> Views:
        grid = self.options.grid
        [view] = views
        side = 2 * view.shape[-1] // (grid + 1)
        starts = range(0, side * grid // 2, side // 2)
        return [view[..., y : y + side, x : x + side] for y in starts for x in starts]

    def losses(self, heads: Any, seen: Seen) -> Told:
        grid, ahead = self.options.grid, self.options.ahead
        projected = wide(heads.projector(seen.features.to(heads.projector[0].weight.dtype)))
        count, _, width = projected.shape
        cells = projected.view(count, grid, grid, width)  # rows, columns
        columns = cells.transpose(1, 2).reshape(count * grid, grid, width)
        context, _ = heads.context(columns.to(heads.context.weight_ih_l0.dtype))
        told = wide(heads.maps(context)).view(count, grid, grid, ahead, width).transpose(1, 2)  # rows, columns, k
        every, losses, pairs = projected.reshape(-1, width), projected.new_zeros(count), 0
        places = torch.arange(count * grid * grid, device=projected.device).view(count, grid, grid)
        for k in range(1, ahead + 1):
            guesses, right = told[:, : grid - k, :, k - 1], places[:, k:]
            logits = guesses.reshape(-1, width) @ every.T / self.options.temperature
            losses = losses + (logits.logsumexp(1) - logits.gather(1, right.reshape(-1, 1))[:, 0]).view(count, -1).sum(1)
            pairs += (grid - k) * grid
        return Told(losses / pairs, unit(projected))


open_objective = Cpc
