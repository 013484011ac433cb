"""The decoding cache for rows that go ahead by different numbers of tokens: drafts are fed with the token they follow, and kept or not.

Shape letters as in `cache.py`; n tokens are fed for each row at once. A fed token that is not kept stays in the block behind the row's
length, where nothing sees it, until the next token of that place is written over it.
"""

from __future__ import annotations

import torch

from terrace.generation.cache import SharedPromptCache, _partial
from terrace.models.shared_prompt import Unit


class DraftCache(SharedPromptCache):
    """See models.shared_prompt.DecodeAttention; `attend` takes A * n tokens, those of a row one after another."""

    def __init__(
        self, prefilled: dict[int, tuple[torch.Tensor, torch.Tensor]], units: list[Unit], samples: int, max_tokens: int, most: int
    ) -> None:
        """`most`: tokens that are fed for a row at once, at most."""
        super().__init__(prefilled, units, samples, max_tokens + most)
        self._lengths = torch.zeros(len(self._prompt_of_row), dtype=torch.int64, device=self._prompt_of_row.device)

    def keep_rows(self, rows: torch.Tensor) -> None:
        super().keep_rows(rows)
        self._lengths = self._lengths[rows]

    def keep_tokens(self, counts: torch.Tensor) -> None:
        """After the last layer: the first `counts` [A] of the tokens that were fed are part of the responses now."""
        self._lengths = self._lengths + counts
        self._length = int(self._lengths.max())

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """query [1, H, A * n, D], key and value [1, K, A * n, D] -> [1, A * n, H, D]."""
        rows, heads, size = len(self._lengths), query.shape[1], query.shape[3]
        fed, kv_heads = query.shape[2] // rows, key.shape[1]
        share, longest = heads // kv_heads, self._length + fed
        places = self._lengths[:, None] + torch.arange(fed, device=key.device)  # [A, n]
        own_key, own_value = self._responses[layer]
        which = torch.arange(rows, device=key.device)[:, None]
        own_key[which, :, places] = key[0].transpose(0, 1).reshape(rows, fed, kv_heads, -1)
        own_value[which, :, places] = value[0].transpose(0, 1).reshape(rows, fed, kv_heads, -1)
        grouped = query[0].transpose(0, 1).reshape(rows, fed, kv_heads, share, size).transpose(1, 2)
        grouped = grouped.reshape(rows, kv_heads, fed * share, size) * scale
        numbers = torch.arange(longest, device=key.device)
        hidden = numbers > places[:, :, None]  # [A, n, longest]: fed later, or never kept
        if window is not None:
            hidden = hidden | (places[:, :, None] - numbers >= window)
        own = _partial(grouped, own_key[:, :, :longest], own_value[:, :, :longest], hidden.repeat_interleave(share, dim=1)[:, None])
        prompt = self._to_prompts(layer, grouped, places, window)
        peak = torch.maximum(own[0], prompt[0])
        own_weight, prompt_weight = (own[0] - peak).exp(), (prompt[0] - peak).exp()
        out = own[2] * own_weight + prompt[2] * prompt_weight
        out = out / (own[1] * own_weight + prompt[1] * prompt_weight)
        out = out.reshape(rows, kv_heads, fed, share, -1).transpose(1, 2)
        return out.reshape(1, rows * fed, heads, -1).to(query.dtype)

    def _to_prompts(
        self, layer: int, grouped: torch.Tensor, places: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, ...]:
        """`_partial` over the prompts of grouped queries [A, K, n * h, D] at `places` [A, n] of their responses."""
        together = grouped.shape[2]
        if window is None:
            found = _partial(self._to_table(grouped), *self._prompts[layer], self._hidden[:, None, None, :])
            return tuple(self._from_table(part, together) for part in found)
        # Rows stand at different places, so each sees another part of its prompt.
        key, value = (block[self._prompt_of_row] for block in self._prompts[layer])
        unused = self._hidden[self._prompt_of_row]  # [A, P]
        after = (~unused).sum(dim=1)[:, None] + places  # [A, n]
        behind = after[:, :, None] - torch.arange(unused.shape[1], device=key.device) >= window
        hidden = (behind | unused[:, None]).repeat_interleave(together // places.shape[1], dim=1)
        return _partial(grouped, key, value, hidden[:, None])
