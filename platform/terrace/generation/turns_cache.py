"""Keys and values of conversations: one copy of each prompt for its whole group, and each conversation's own, of any length.

Rows (conversations) are fed as many tokens at a time as they have: an observation at once, an answer token by token. A row keeps what
it was fed, so that nothing is ever computed twice. Against `cache.SharedPromptCache`, whose rows are all equally long, a step costs a
copy of the prompts' keys and values of the rows that it feeds.

Shape letters: B prompts, R rows, A rows that are fed, N tokens fed, n most of one row, K key-value heads, H heads, D head size, P
longest prompt, L longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from terrace.models.shared_prompt import Unit

GROWTH_TOKENS = 64  # by which the rows' blocks grow at least


class TurnsCache:
    """See models.shared_prompt.DecodeAttention."""

    def __init__(self, prefilled: dict[int, tuple[torch.Tensor, torch.Tensor]], units: Sequence[Unit], samples: int) -> None:
        """`prefilled`: per layer keys and values [1, K, sum of prompts, D] of the packed prompts."""
        device, longest, rows = next(iter(prefilled.values()))[0].device, max(unit.prompt for unit in units), len(units) * samples
        self._prompt_lengths = torch.tensor([unit.prompt for unit in units], device=device)
        self._prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in list(prefilled):
            pair = []
            for packed in prefilled.pop(layer):
                block = packed.new_zeros(len(units), packed.shape[1], longest, packed.shape[3])
                for place, unit in enumerate(units):
                    block[place, :, : unit.prompt] = packed[0, :, unit.start : unit.start + unit.prompt]
                pair.append(block)
            self._prompts[layer] = (pair[0], pair[1])
            self._own[layer] = tuple(block.new_zeros(rows, block.shape[1], 0, block.shape[3]) for block in pair)  # type: ignore[assignment]
        self._samples = samples
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # tokens of each row so far
        self.tokens_fed = 0  # in all: what was computed behind the prompts

    def feed(self, rows: torch.Tensor, counts: Sequence[int]) -> None:
        """The next forward pass brings `counts[a]` tokens of row `rows[a]` (int64 [A]), one row after another."""
        device = self._lengths.device
        fed = torch.tensor(counts, device=device)
        self._rows, self._fed, self._most = rows, fed, max(counts)
        self._of_token = torch.arange(len(counts), device=device).repeat_interleave(fed)  # a of each token
        first = fed.cumsum(0) - fed
        self._within = torch.arange(int(sum(counts)), device=device) - first[self._of_token]
        past = self._lengths[rows]
        self._longest = int((past + fed).max())
        self._grow(self._longest)
        prompt = self._prompt_lengths[rows // self._samples]
        longest = self._prompts[next(iter(self._prompts))][0].shape[2]
        places = torch.cat([  # [A, P + L] of each key in its conversation, beyond everything where there is none
            torch.where(torch.arange(longest, device=device) < prompt[:, None], torch.arange(longest, device=device), 1 << 60),
            prompt[:, None] + torch.arange(self._longest, device=device),
        ], dim=1)  # fmt: skip
        asked = (prompt + past)[:, None] + torch.arange(self._most, device=device)  # [A, n]
        self._behind = asked[:, :, None] - places[:, None, :]  # [A, n, P + L]: how far back a key stands

    def _grow(self, tokens: int) -> None:
        room = next(iter(self._own.values()))[0].shape[2]
        if tokens > room:
            more = max(tokens - room, GROWTH_TOKENS)
            self._own = {layer: (F.pad(key, (0, 0, 0, more)), F.pad(value, (0, 0, 0, more))) for layer, (key, value) in self._own.items()}

    def fed(self) -> None:
        """The forward pass is over."""
        self._lengths[self._rows] += self._fed
        self.tokens_fed += int(self._fed.sum())

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """query [1, H, N, D], key and value [1, K, N, D] of the tokens fed -> [1, N, H, D]."""
        rows = self._rows[self._of_token]
        own_key, own_value = self._own[layer]
        place = self._lengths[rows] + self._within
        own_key[rows, :, place] = key[0].transpose(0, 1)
        own_value[rows, :, place] = value[0].transpose(0, 1)
        asked = query.new_zeros(len(self._rows), query.shape[1], self._most, query.shape[3])
        asked[self._of_token, :, self._within] = query[0].transpose(0, 1)
        prompts = self._rows // self._samples
        keys, values = (
            torch.cat([shared[prompts], own[self._rows, :, : self._longest]], dim=2)
            for shared, own in zip(self._prompts[layer], (own_key, own_value))
        )
        seen = self._behind >= 0 if window is None else (self._behind >= 0) & (self._behind < window)
        out = F.scaled_dot_product_attention(
            asked, keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=asked.shape[1] != keys.shape[1]
        )
        return out[self._of_token, :, self._within].unsqueeze(0)
