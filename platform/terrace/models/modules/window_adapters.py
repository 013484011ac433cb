"""Monkey's adapters of the vision tower: a low-rank addition of its own for each window that a picture is cut into.

A picture is a grid of windows and an overview behind them, each a square of the tower's size. In every block a window's adapters
add to query, key and value (which share what leads into them), to what leaves attention, and beside the feed-forward to what came out of
attention; the overview has none. What leads out of an adapter begins at zero, so the tower begins as it was. Its own names stay.

Shape letters: N squares, P their tokens, W width of the tower, K windows of a picture, r rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import initialization as init


class Squares:
    """Which window each square of the present call is, int64 [N]; -1 for an overview."""

    def __init__(self, windows: int) -> None:
        self.windows = windows
        self.numbers = torch.zeros(0, dtype=torch.long)

    def set(self, squares: int, device: torch.device) -> None:
        """Squares stand picture by picture, the overview behind its windows."""
        numbers = torch.arange(squares, device=device) % (self.windows + 1)
        self.numbers = numbers.masked_fill(numbers == self.windows, -1)


class WindowLinear(nn.Module):
    """A matrix for each window, zeros for overviews: [N, P, in] -> [N, P, out]; with `scaled`, times a learned number."""

    def __init__(self, windows: int, inputs: int, outputs: int, squares: Squares, scaled: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(windows, outputs, inputs))
        self.scale = nn.Parameter(torch.ones(windows)) if scaled else None
        self.squares = squares

    def reset_own_parameters(self) -> None:
        if self.scale is None:  # leads out
            init.zeros_(self.weight)
        else:
            init.uniform_(self.weight, -(self.weight.shape[2] ** -0.5), self.weight.shape[2] ** -0.5)
            init.ones_(self.scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        numbers = self.squares.numbers
        own, shown = numbers.clamp_min(0), (numbers >= 0).to(features.dtype)
        out = torch.bmm(features, self.weight[own].to(features.dtype).transpose(1, 2))
        factor = shown if self.scale is None else shown * self.scale[own].to(features.dtype)
        return out * factor[:, None, None]


class WindowAdapters(nn.Module):
    """Those of one block."""

    def __init__(self, width: int, windows: int, attention_rank: int, mlp_rank: int, squares: Squares) -> None:
        super().__init__()
        make = partial(WindowLinear, windows, squares=squares)
        self.attention_down, self.output_down, self.mlp_down = (
            make(width, rank, scaled=True) for rank in (attention_rank, attention_rank, mlp_rank)
        )
        self.q_up, self.k_up, self.v_up, self.output_up = (make(attention_rank, width) for _ in range(4))
        self.mlp_up = make(mlp_rank, width)


def add_window_adapters(tower: Any, windows: int, attention_rank: int, mlp_rank: int) -> Squares:
    """Give every block of a CLIP or SigLIP tower its adapters. What is returned must know the squares of each call."""
    squares = Squares(windows)
    for block in tower.encoder.layers:
        width = block.self_attn.q_proj.in_features
        block.window_adapters = adapters = WindowAdapters(width, windows, attention_rank, mlp_rank, squares)
        into = {"q_proj": adapters.q_up, "k_proj": adapters.k_up, "v_proj": adapters.v_up}
        for name, up in into.items():
            getattr(block.self_attn, name).register_forward_hook(partial(_added, adapters.attention_down, up))
        block.self_attn.out_proj.register_forward_hook(partial(_added, adapters.output_down, adapters.output_up))
        block.layer_norm2.register_forward_pre_hook(partial(_remembered, adapters))
        block.mlp.register_forward_hook(partial(_added_beside, adapters))
    return squares


def _added(down: WindowLinear, up: WindowLinear, layer: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return out + up(down(given[0]))


def _remembered(adapters: WindowAdapters, norm: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    adapters.__dict__["after_attention"] = given[0]


def _added_beside(adapters: WindowAdapters, mlp: nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return out + adapters.mlp_up(adapters.mlp_down(adapters.__dict__.pop("after_attention")))
