"""The resampler of Qwen-VL, LLaVA-UHD and MiniCPM-V: learned queries read the patches through one cross-attention layer.

Whatever the number of patches, as many tokens come out as there are queries. With `positions` `queries_and_keys` (Qwen-VL)
the queries stand on a square grid whose sine positions are added to them, and to the keys stretched over the patches' grid;
with `keys` (MiniCPM-V) the patches' own sine positions are added to the keys alone. Values never have any. Pictures of different
sizes stand padded beside each other, each with the positions of its own grid, and nobody reads their padding.

Shape letters: N pictures, P patches, Q queries, W width of the tower, H of the language model.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .padded_pictures import padded_tables
from .sine_positions import resized_positions, sine_positions


class Resampler(nn.Module):
    """[N, P, W] -> [N, Q, H]"""

    def __init__(
        self, vision_width: int, width: int, queries: int, heads: int, positions: str = "queries_and_keys", output_projection: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.positions = heads, positions
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.query_norm = nn.LayerNorm(width, eps=1e-6)
        self.kv_norm = nn.LayerNorm(width, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.output_norm = nn.LayerNorm(width, eps=1e-6) if output_projection else None
        self.output_proj = nn.Linear(width, width, bias=False) if output_projection else None

    def forward(
        self, features: torch.Tensor, rows: int, columns: int, sizes: Sequence[tuple[int, int]] = (), seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`rows` and `columns` of patches are those of every picture, unless `sizes` says them of each; `seen` bool [N, P] is then
        false for padding."""
        values = self.kv_norm(self.kv_proj(features))
        queries = self.query_norm(self.query)
        if self.positions == "queries_and_keys":
            grid = math.isqrt(len(queries))
            queries = queries + resized_positions(queries.shape[-1], grid, grid, grid, queries.device).to(queries.dtype)

        def positions(rows: int, columns: int) -> torch.Tensor:
            return self._key_positions(rows, columns, values.device).to(values.dtype)

        keys = values + (padded_tables(sizes, positions, features.shape[1]) if sizes else positions(rows, columns))
        # Queries are the same for every picture: projected once.
        q = self.q_proj(queries).expand(len(features), -1, -1)
        q, k, v = (self._by_head(tensor) for tensor in (q, self.k_proj(keys), self.v_proj(values)))
        mask = None if seen is None else seen[:, None, None]
        out = nn.functional.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return out if self.output_proj is None else self.output_proj(self.output_norm(out))

    def _key_positions(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """float32 [rows * columns, H]"""
        queries, width = self.query.shape
        if self.positions == "queries_and_keys":
            return resized_positions(width, math.isqrt(queries), rows, columns, device)
        return sine_positions(width, rows, columns, device)

    def _by_head(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(2, (self.heads, -1)).transpose(1, 2)
