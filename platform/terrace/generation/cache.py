"""Keys and values while decoding: one copy of each prompt for its whole group, and a static block for the responses.

Shape letters: B prompts, R sequences (rows), K key-value heads, H heads, D head size, P longest prompt, T most response
tokens. Prompts are padded to P once; responses all have the same number of tokens so far, so they need no padding.
Attention to prompt and response is computed separately and joined by the usual online softmax (running maximum and
sum).
"""

from __future__ import annotations

import torch

from terrace.models.families.crossing import BESIDE
from terrace.models.shared_prompt import Unit


class SharedPromptCache:
    """See models.shared_prompt.DecodeAttention."""

    def __init__(
        self, prefilled: dict[int, tuple[torch.Tensor, torch.Tensor]], units: list[Unit], samples: int, max_tokens: int
    ) -> None:
        """`prefilled`: per layer keys and values [1, K, sum of prompts, D] of the packed prompts."""
        self._beside = prefilled.pop(BESIDE, None)  # of a model whose layers read the prompts' pictures
        key = prefilled[0][0]
        heads = key.shape[1]
        longest, count = max(unit.prompt for unit in units), len(units)
        lengths = torch.tensor([unit.prompt for unit in units], device=key.device)
        self._hidden = torch.arange(longest, device=key.device)[None] >= lengths[:, None]  # [B, P]
        self._prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._responses: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in list(prefilled):
            pair = []
            for packed in prefilled.pop(layer):
                block = packed.new_zeros(count, heads, longest, packed.shape[3])
                for place, unit in enumerate(units):
                    block[place, :, : unit.prompt] = packed[0, :, unit.start : unit.start + unit.prompt]
                pair.append(block)
            self._prompts[layer] = (pair[0], pair[1])
            own_key, own_value = (block.new_zeros(count * samples, heads, max_tokens, block.shape[3]) for block in pair)
            self._responses[layer] = (own_key, own_value)
        self._prompt_of_row = torch.arange(count * samples, device=key.device) // samples
        self._length = 0
        self._place_rows()

    def _place_rows(self) -> None:
        """Give each row a place in a table [B, widest group], so that a prompt meets its rows in one product."""
        order = torch.arange(len(self._prompt_of_row), device=self._prompt_of_row.device)
        counts = torch.bincount(self._prompt_of_row, minlength=len(self._hidden))
        first = counts.cumsum(0) - counts
        self._width = int(counts.max())
        self._places = self._prompt_of_row * self._width + order - first[self._prompt_of_row]
        self._full = bool((counts == self._width).all())

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows only (ascending). Prompts without rows leave too."""
        remaining = self._prompt_of_row[rows]
        prompts, self._prompt_of_row = torch.unique(remaining, return_inverse=True)
        fewer_prompts = len(prompts) < len(self._hidden)
        for layer, (key, value) in self._responses.items():
            # Only the tokens so far are copied; the rest of the static block is unused.
            for block in (key, value):
                block[: len(rows), :, : self._length] = block[rows, :, : self._length]
            self._responses[layer] = (key[: len(rows)], value[: len(rows)])
            if fewer_prompts:
                prompt_key, prompt_value = self._prompts[layer]
                self._prompts[layer] = (prompt_key[prompts], prompt_value[prompts])
        if fewer_prompts:
            self._hidden = self._hidden[prompts]
            self._beside = None if self._beside is None else tuple(part[prompts] for part in self._beside)
        self._place_rows()

    @property
    def beside(self) -> tuple[torch.Tensor, ...]:
        """What the prefill kept of the prompts' pictures, and the prompt of each row [A]."""
        return (*self._beside, self._prompt_of_row)

    def advance(self) -> None:
        """After the last layer: the new token is part of the responses now."""
        self._length += 1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """query [1, H, A, D], key and value [1, K, A, D] of one new token per row -> [1, A, H, D]."""
        heads, rows, size = query.shape[1], query.shape[2], query.shape[3]
        kv_heads = key.shape[1]
        own_key, own_value = self._responses[layer]
        own_key[:, :, self._length] = key[0].transpose(0, 1)
        own_value[:, :, self._length] = value[0].transpose(0, 1)
        grouped = query[0].transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, size) * scale
        filled = slice(0 if window is None else max(0, self._length + 1 - window), self._length + 1)
        hidden = self._hidden if window is None else self._hidden | self._behind(window)
        own = _partial(grouped, own_key[:, :, filled], own_value[:, :, filled], None)
        table = self._to_table(grouped)
        prompt = tuple(self._from_table(part, heads // kv_heads) for part in _partial(
            table, *self._prompts[layer], hidden[:, None, None, :]
        ))  # fmt: skip
        peak = torch.maximum(own[0], prompt[0])
        own_weight, prompt_weight = (own[0] - peak).exp(), (prompt[0] - peak).exp()
        out = own[2] * own_weight + prompt[2] * prompt_weight
        out = out / (own[1] * own_weight + prompt[1] * prompt_weight)
        return out.to(query.dtype).reshape(1, rows, heads, value.shape[3])

    def _behind(self, window: int) -> torch.Tensor:
        """bool [B, P]: tokens of each prompt that lie further back than `window` from the new token."""
        lengths = (~self._hidden).sum(dim=1, keepdim=True)
        return lengths + self._length - torch.arange(self._hidden.shape[1], device=self._hidden.device)[None] >= window

    def _to_table(self, grouped: torch.Tensor) -> torch.Tensor:
        """[A, K, h, D] -> [B, K, width * h, D], zeros where a group has fewer rows than the widest."""
        _, kv_heads, share, size = grouped.shape
        prompts = len(self._hidden)
        if self._full:
            table = grouped.reshape(prompts, self._width, kv_heads, share, size)
        else:
            table = grouped.new_zeros(prompts * self._width, kv_heads, share, size)
            table[self._places] = grouped
            table = table.view(prompts, self._width, kv_heads, share, size)
        return table.transpose(1, 2).reshape(prompts, kv_heads, self._width * share, size)

    def _from_table(self, table: torch.Tensor, share: int) -> torch.Tensor:
        """[B, K, width * h, X] -> [A, K, h, X]."""
        prompts, kv_heads, _, last = table.shape
        rows = table.view(prompts, kv_heads, self._width, share, last).transpose(1, 2)
        rows = rows.reshape(prompts * self._width, kv_heads, share, last)
        return rows if self._full else rows[self._places]


def _partial(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maximum [.., 1], sum [.., 1] and unnormalised output [.., D] of softmax attention, in float32."""
    scores = (query @ key.transpose(-1, -2)).float()
    if hidden is not None:
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)  # finite: all of a prompt may be hidden
    peak = scores.amax(dim=-1, keepdim=True)
    weights = (scores - peak).exp()
    return peak, weights.sum(dim=-1, keepdim=True), (weights.to(value.dtype) @ value).float()
