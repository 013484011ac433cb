"""A Q-Former as a connector: queries that look at each other in every layer and at the patches in every second one, then a linear layer.

A layer is BERT's, with the norm behind each sum. BLIP-2's class in transformers computes the same; here it is without text.
"""

import torch
from torch import nn


class Attention(nn.Module):
    """Queries of one sequence over another, the sum with what came in, and the norm behind it."""

    def __init__(self, width: int, other_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj, self.v_proj = nn.Linear(other_width, width), nn.Linear(other_width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            tensor.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for tensor in (self.q_proj(hidden), self.k_proj(other), self.v_proj(other))
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(self.o_proj(out) + hidden)


class QFormerLayer(nn.Module):
    def __init__(self, width: int, vision_width: int, heads: int, looks: bool) -> None:
        super().__init__()
        self.own_attention = Attention(width, width, heads)
        self.picture_attention = Attention(width, vision_width, heads) if looks else None
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        hidden = self.own_attention(hidden, hidden)
        if self.picture_attention is not None:
            hidden = self.picture_attention(hidden, features)
        return self.norm(self.down_proj(nn.functional.gelu(self.up_proj(hidden))) + hidden)


class QFormer(nn.Module):
    """[N, P, W] -> [N, Q, H]"""

    def __init__(self, vision_width: int, width: int, queries: int, layers: int, inner_width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, inner_width))
        self.query_norm = nn.LayerNorm(inner_width, eps=1e-12)
        self.layers = nn.ModuleList(QFormerLayer(inner_width, vision_width, heads, number % 2 == 0) for number in range(layers))
        self.output_proj = nn.Linear(inner_width, width)

    def forward(self, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        hidden = self.query_norm(self.query).expand(len(features), -1, -1)
        for layer in self.layers:
            hidden = layer(hidden, features)
        return self.output_proj(hidden)
