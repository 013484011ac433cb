"""Keys and values while decoding: one copy of each prompt for its whole group, and a block that grows for the responses.

Shape letters: B prompts, R sequences (rows), K key-value heads, H heads, D head size, P longest prompt, T tokens that a row has
room for, n tokens fed for a row at once (1, or drafts after it). A row is a place: when its sequence has ended, another begins in
it. Rows may stand at different lengths; a fed token that is not kept stays behind its row's length, where nothing sees it, until the
next token of that place is written over it. Attention to prompt and response is computed separately and
joined by the logarithms of their sums of exponentials.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from terrace.models.families.crossing import BESIDE
from terrace.models.shared_prompt import Unit

UNSEEN = -1e30
ROOM = 64  # tokens of a response that there is room for at first; then twice as many whenever it is used up

Packed = dict[int, tuple[torch.Tensor, torch.Tensor]]  # per layer keys and values [1, K, sum of prompts, D]


@dataclass
class _Step:
    """What all layers of a pass share. `length`: that of every live row, or None where they differ."""

    length: int | None
    longest: int  # tokens of the longest response once these are fed
    places: torch.Tensor | None = None  # int64 [R, n]
    known: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def unseen(self, window: int | None, share: int) -> torch.Tensor:
        """float32 [R, 1, n * share, longest]: what is fed later, was never kept, or lies behind the window."""
        if (window, share) not in self.known:
            assert self.places is not None
            numbers = torch.arange(self.longest, device=self.places.device)
            hidden = numbers > self.places[:, :, None]
            if window is not None:
                hidden = hidden | (self.places[:, :, None] - numbers >= window)
            self.known[window, share] = _bias(hidden.repeat_interleave(share, dim=1)[:, None])
        return self.known[window, share]


class SharedPromptCache:
    """See models.shared_prompt.DecodeAttention; `attend` takes R * n tokens, those of a row one after another."""

    def __init__(self, rows: int) -> None:
        self._prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # per layer [B, K, P, D]
        self._responses: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # per layer [R, K, T, D]
        self._beside: tuple[torch.Tensor, ...] | None = None  # of a model whose layers read the prompts' pictures
        self._numbers: list[int] = []  # the caller's number of each prompt
        self.prompt_lengths = np.zeros(0, np.int64)  # of each prompt
        self.prompt_of_row = np.zeros(rows, np.int64)  # its place among the prompts; 0 of a row without a sequence
        self._number_of_row = np.full(rows, -1, np.int64)
        self._lengths = np.zeros(rows, np.int64)
        self._live = np.zeros(rows, bool)
        self._room = 0
        self._step: _Step | None = None

    # ------------------------------------------------------------ prompts and rows

    def add_prompts(self, numbers: Sequence[int], packed: Packed, units: Sequence[Unit], waiting: Container[int] = ()) -> None:
        """Take over the prompts that `units` cut out of `packed`. Prompts that no row has and that are not `waiting` leave."""
        needed = set(self._number_of_row.tolist())
        kept = [place for place, number in enumerate(self._numbers) if number in needed or number in waiting]
        lengths = np.concatenate([self.prompt_lengths[kept], [unit.prompt for unit in units]]).astype(np.int64)
        longest = int(lengths.max())
        if (beside := packed.pop(BESIDE, None)) is not None:
            before = self._beside or tuple(part[:0] for part in beside)
            self._beside = tuple(_as_wide(old[kept], new) for old, new in zip(before, beside))
        for layer in list(packed):
            pair = packed.pop(layer)
            self._prompts[layer] = tuple(
                _joined(old, kept, new, units, longest) for old, new in zip(self._prompts.get(layer, (None, None)), pair)
            )  # type: ignore[assignment]
        self._numbers = [self._numbers[place] for place in kept] + list(numbers)
        self.prompt_lengths = lengths
        self._hide()

    def begin(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        """In these rows sequences begin that answer the prompts of these numbers."""
        self._number_of_row[rows], self._lengths[rows], self._live[rows] = numbers, 0, True
        self._place_rows()

    def end(self, rows: np.ndarray) -> None:
        """The sequences of these rows have ended. The rows are computed on until others begin in them, or they are left out."""
        self._live[rows] = False

    def keep_rows(self, rows: np.ndarray) -> None:
        """Go on with these rows only (ascending). Prompts without rows leave too."""
        self._number_of_row, self._lengths, self._live = self._number_of_row[rows], self._lengths[rows], self._live[rows]
        used = set(self._number_of_row.tolist())
        prompts = [place for place, number in enumerate(self._numbers) if number in used]
        fewer, filled = len(prompts) < len(self._numbers), int(self._lengths.max(initial=0))
        for layer, (key, value) in self._responses.items():
            chosen = torch.from_numpy(rows).to(key.device)
            for block in (key, value):  # only the tokens so far are copied
                block[: len(rows), :, :filled] = block[chosen, :, :filled]
            self._responses[layer] = (key[: len(rows)], value[: len(rows)])
        if fewer:
            for layer, (key, value) in self._prompts.items():  # there are prompts before there is any response
                self._prompts[layer] = (key[prompts], value[prompts])
            self._numbers = [self._numbers[place] for place in prompts]
            self.prompt_lengths = self.prompt_lengths[prompts]
            self._beside = None if self._beside is None else tuple(part[prompts] for part in self._beside)
            self._hide()
        self._place_rows()

    @property
    def beside(self) -> tuple[torch.Tensor, ...]:
        """What the prefill kept of the prompts' pictures, and the prompt of each row [R]."""
        return (*(self._beside or ()), self._prompt_of_row)

    def advance(self, counts: np.ndarray | int = 1) -> None:
        """After the last layer: the first `counts` tokens that were fed for each live row are part of its response now."""
        self._lengths += np.where(self._live, counts, 0)
        self._step = None

    def _hide(self) -> None:
        key = next(iter(self._prompts.values()))[0]
        lengths = torch.from_numpy(self.prompt_lengths).to(key.device)
        self._hidden = torch.arange(key.shape[2], device=key.device)[None] >= lengths[:, None]  # [B, P]
        self._unseen = _bias(self._hidden[:, None, None, :]) if bool(self._hidden.any()) else None

    def _place_rows(self) -> None:
        """Give each row a place in a table [B, widest group], so that a prompt meets its rows in one product."""
        device = self._hidden.device
        place_of = {number: place for place, number in enumerate(self._numbers)}
        prompt_of_row = np.asarray([place_of.get(number, 0) for number in self._number_of_row.tolist()], np.int64)
        counts = np.bincount(prompt_of_row, minlength=len(self._numbers))
        order = np.argsort(prompt_of_row, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._width = int(counts.max())
        places = prompt_of_row * self._width + rank
        self._in_order = bool((places == np.arange(len(places))).all()) and len(places) == len(counts) * self._width
        self._places = torch.from_numpy(places).to(device)
        self.prompt_of_row, self._prompt_of_row = prompt_of_row, torch.from_numpy(prompt_of_row).to(device)
        self._step = None

    # ------------------------------------------------------------ a pass

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """query [1, H, R * n, D], key and value [1, K, R * n, D] of the new tokens -> [1, R * n, H, D]."""
        rows = len(self._lengths)
        fed = query.shape[2] // rows
        query, key, value = (tensor[0].transpose(0, 1).unflatten(0, (rows, fed)) for tensor in (query, key, value))
        return self._attend(layer, query, key, value, scale, window).flatten(0, 1)[None]

    def attend_rows(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None = None
    ) -> torch.Tensor:
        """query [R, H, D], key and value [R, K, D] of one new token per row -> [R, H, D]."""
        return self._attend(layer, query[:, None], key[:, None], value[:, None], scale, window)[:, 0]

    def _attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """query [R, n, H, D], key and value [R, n, K, D] -> [R, n, H, D]."""
        rows, fed, heads, size = query.shape
        kv_heads = key.shape[2]
        share = heads // kv_heads
        step = self._now(fed, key.device)
        own_key, own_value = self._with_room(layer, key, value, step.longest)
        first, unseen = 0, None
        if step.length is not None:
            own_key[:, :, step.length], own_value[:, :, step.length] = key[:, 0], value[:, 0]
            first = 0 if window is None else max(0, step.longest - window)
        else:
            which = torch.arange(rows, device=key.device)[:, None]
            own_key[which, :, step.places], own_value[which, :, step.places] = key, value
            unseen = step.unseen(window, share)
        grouped = (query * scale).view(rows, fed, kv_heads, share, size).transpose(1, 2)
        grouped = grouped.reshape(rows, kv_heads, fed * share, size)
        own = _attended(grouped, own_key[:, :, first : step.longest], own_value[:, :, first : step.longest], unseen)
        prompt = self._to_prompts(layer, grouped, step, window)
        out = torch.lerp(prompt[0], own[0], torch.sigmoid(own[1] - prompt[1]))
        out = out.reshape(rows, kv_heads, fed, share, -1).transpose(1, 2)
        return out.reshape(rows, fed, heads, -1).to(query.dtype)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R]: tokens of each response so far."""
        return self._lengths

    def with_room(self, layer: int, kv_heads: int, size: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a layer, of the prompts [B, K, P, D] and of the responses [R, K, T, D], with room for a token more of each
        live row. For a step that writes and attends by itself."""
        prompts = self._prompts[layer]
        like = prompts[0].new_empty(1).expand(len(self._lengths), 1, kv_heads, size)
        return prompts, self._with_room(layer, like, like, int(self._lengths[self._live].max(initial=0)) + 1)

    def _now(self, fed: int, device: torch.device) -> _Step:
        if self._step is None:
            lengths = self._lengths[self._live]
            most = int(lengths.max(initial=0))
            if fed == 1 and int(lengths.min(initial=most)) == most:
                self._step = _Step(most, most + 1)
                return self._step
            # What a row without a sequence would write stays within the block.
            own = torch.from_numpy(np.minimum(self._lengths, most)).to(device)
            places = own[:, None] + torch.arange(fed, device=device)
            self._step = _Step(None, most + fed, places)
        return self._step

    def _with_room(self, layer: int, key: torch.Tensor, value: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The response block of a layer with room for `longest` tokens; key and value [R, n, K, D] of new ones."""
        if longest > self._room:
            self._room = max(ROOM, longest, 2 * self._room)
        pair = self._responses.get(layer)
        if pair is None or pair[0].shape[2] < longest:
            grown = tuple(tensor.new_zeros(len(tensor), tensor.shape[2], self._room, tensor.shape[3]) for tensor in (key, value))
            for block, old in zip(grown, pair or ()):
                block[:, :, : old.shape[2]] = old
            pair = self._responses[layer] = (grown[0], grown[1])
        return pair

    def _to_prompts(self, layer: int, grouped: torch.Tensor, step: _Step, window: int | None) -> tuple[torch.Tensor, ...]:
        """`_attended` over the prompts, of grouped queries [R, K, n * h, D]."""
        together = grouped.shape[2]
        if window is None or step.length is not None:
            unseen = self._unseen
            if window is not None:
                unseen = _bias((self._hidden | self._behind(window, int(step.length or 0)))[:, None, None, :])
            found = _attended(self._to_table(grouped), *self._prompts[layer], unseen)
            return tuple(self._from_table(part, together) for part in found)
        # Rows stand at different places, so each sees another part of its prompt.
        key, value = (block[self._prompt_of_row] for block in self._prompts[layer])
        unused = self._hidden[self._prompt_of_row]  # [R, P]
        assert step.places is not None
        after = (~unused).sum(dim=1)[:, None] + step.places  # [R, n]
        behind = after[:, :, None] - torch.arange(unused.shape[1], device=key.device) >= window
        hidden = (behind | unused[:, None]).repeat_interleave(together // step.places.shape[1], dim=1)
        return _attended(grouped, key, value, _bias(hidden[:, None]))

    def _behind(self, window: int, length: int) -> torch.Tensor:
        """bool [B, P]: tokens of each prompt that lie further back than `window` from a token at `length` of its response."""
        lengths = (~self._hidden).sum(dim=1, keepdim=True)
        return lengths + length - torch.arange(self._hidden.shape[1], device=self._hidden.device)[None] >= window

    def _to_table(self, grouped: torch.Tensor) -> torch.Tensor:
        """[R, K, h, D] -> [B, K, width * h, D], zeros where a group has fewer rows than the widest."""
        _, kv_heads, share, size = grouped.shape
        prompts = len(self._numbers)
        if self._in_order:
            table = grouped.reshape(prompts, self._width, kv_heads, share, size)
        else:
            table = grouped.new_zeros(prompts * self._width, kv_heads, share, size)
            table[self._places] = grouped
            table = table.view(prompts, self._width, kv_heads, share, size)
        return table.transpose(1, 2).reshape(prompts, kv_heads, self._width * share, size)

    def _from_table(self, table: torch.Tensor, share: int) -> torch.Tensor:
        """[B, K, width * h, X] -> [R, K, h, X]."""
        prompts, kv_heads, _, last = table.shape
        rows = table.view(prompts, kv_heads, self._width, share, last).transpose(1, 2)
        rows = rows.reshape(prompts * self._width, kv_heads, share, last)
        return rows if self._in_order else rows[self._places]


def _joined(
    old: torch.Tensor | None, kept: list[int], packed: torch.Tensor, units: Sequence[Unit], longest: int
) -> torch.Tensor:
    """[B, K, longest, D]: the `kept` prompts of a block and then those of `units`, filled up with zeros."""
    block = packed.new_zeros(len(kept) + len(units), packed.shape[1], longest, packed.shape[3])
    if old is not None and kept:
        shared = min(longest, old.shape[2])
        block[: len(kept), :, :shared] = old[kept, :, :shared]
    for place, unit in enumerate(units, len(kept)):
        block[place, :, : unit.prompt] = packed[0, :, unit.start : unit.start + unit.prompt]
    return block


def _as_wide(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Both, one under the other; of the second axis the shorter is filled up with zeros."""
    if old.dim() > 1 and old.shape[1] != new.shape[1]:
        blocks = [tensor.transpose(0, 1) for tensor in (old, new)]
        old, new = (block.transpose(0, 1) for block in (_longer(block, max(map(len, blocks))) for block in blocks))
    return torch.cat([old, new])


def _longer(block: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([block, block.new_zeros(length - len(block), *block.shape[1:])])


def _bias(hidden: torch.Tensor) -> torch.Tensor:
    """What is added to scores: a finite number where nothing is seen, since all of a prompt may lie behind a window."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, UNSEEN)


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unseen: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output float32 [.., D] of softmax attention, and the logarithm of its sum of exponentials [.., 1]."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:  # one operation instead of eight
        bias = None if unseen is None else unseen.to(query.dtype)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, attn_mask=bias, scale=1.0)
        return out.float(), sums.float().unsqueeze(-1)
    scores = (query @ key.transpose(-1, -2)).float()
    if unseen is not None:
        scores = scores + unseen
    peak = scores.amax(dim=-1, keepdim=True)
    weights = (scores - peak).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return (weights.to(value.dtype) @ value).float() / total, peak + total.log()
