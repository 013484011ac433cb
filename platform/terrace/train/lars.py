"""LARS (You et al. 2017): SGD whose step in each matrix is as large as a share of that matrix, for batches of thousands of pictures.

    g = gradient + decay w;   g <- g trust |w| / |g| for matrices and kernels;   v <- momentum v + g;   w <- w - lr v

Vectors (biases, norms, single tokens) step as under SGD, as in the published self-supervised recipes. Norms are those of whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lars(torch.optim.Optimizer):
    """`trust` is the share; a matrix whose norm or whose gradient's norm is 0 steps as under SGD."""

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, trust: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, group)

    def _step(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        slope = weight.grad.add(weight, alpha=group["weight_decay"]) if group["weight_decay"] else weight.grad
        if weight.dim() > 1:
            size, steep = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(slope)
            share = group["trust"] * size / steep  # of 0 / 0 nothing is taken
            slope = slope * torch.where((size > 0) & (steep > 0), share, torch.ones_like(share))
        if group["momentum"]:
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            slope = state["momentum_buffer"].mul_(group["momentum"]).add_(slope)
        weight.add_(slope, alpha=-group["lr"])
