"""The decoding cache against attention of every row by itself: rows at different lengths, replaced, left out, with and without a window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from terrace.generation import cache as module
from terrace.generation.cache import SharedPromptCache
from terrace.models.shared_prompt import Unit

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 8, 0.3


def expected(query, keys, values, window):
    """query [H, D], keys and values [K, L, D] of all that came before and the token itself."""
    share = HEADS // KV_HEADS
    seen = slice(max(0, keys.shape[1] - window) if window else 0, None)
    scores = torch.einsum("hd,hld->hl", query, keys.repeat_interleave(share, 0)[:, seen]) * SCALE
    return torch.einsum("hl,hld->hd", scores.softmax(-1), values.repeat_interleave(share, 0)[:, seen])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("fed", [1, 2])
def test_every_row_sees_its_prompt_and_itself(window, fused, fed, monkeypatch):
    monkeypatch.setattr(module, "ROOM", 2)  # the block grows on the way
    value_size = SIZE if fused else SIZE + 3  # of another size than keys: the plain formula
    draw = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    cache, histories = SharedPromptCache(4), [None] * 4

    def prompts(numbers, lengths, waiting=()):
        starts = np.concatenate([[0], np.cumsum(lengths)])
        units = [Unit(int(start), int(length)) for start, length in zip(starts, lengths)]
        packed = (random(1, KV_HEADS, sum(lengths), SIZE), random(1, KV_HEADS, sum(lengths), value_size))
        known.update({
            number: tuple(tensor[0, :, unit.start : unit.end] for tensor in packed) for number, unit in zip(numbers, units)
        })  # fmt: skip
        cache.add_prompts(numbers, {0: packed}, units, waiting)

    def begin(rows, numbers):
        cache.begin(np.asarray(rows), np.asarray(numbers))
        for row, number in zip(rows, numbers):
            histories[row] = list(known[number])

    def step(live):
        rows = len(histories)
        shapes = ((HEADS, SIZE), (KV_HEADS, SIZE), (KV_HEADS, value_size))
        query, key, value = (random(1, heads, rows * fed, size) for heads, size in shapes)
        out = cache.attend(0, query, key, value, SCALE, window)
        for row in live:
            before = histories[row]
            for number in range(fed):
                place = row * fed + number
                before = [torch.cat([old, new[0, :, place : place + 1]], 1) for old, new in zip(before, (key, value))]
                assert torch.allclose(out[0, place], expected(query[0, :, place], *before, window), atol=1e-5), (row, number)
                if number == 0:
                    histories[row] = before  # of two fed tokens the second is a draft that is not kept
        cache.advance(1)

    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    prompts([0, 1], [3, 7])
    begin([0, 1, 2, 3], [0, 0, 1, 1])
    for _ in range(3):
        step([0, 1, 2, 3])  # all rows at one length
    cache.end(np.asarray([1]))
    step([0, 2, 3])
    prompts([5], [9], waiting={5})
    begin([1], [5])
    for _ in range(4):
        step([0, 1, 2, 3])
    cache.end(np.asarray([0, 2]))
    step([1, 3])
    prompts([6], [2])  # prompt 0 stays as long as a row has it, ended or not
    begin([0, 2], [6, 6])
    step([0, 1, 2, 3])
    cache.end(np.asarray([1]))
    kept = np.asarray([0, 2, 3])
    cache.keep_rows(kept)
    histories = [histories[row] for row in kept]
    for _ in range(2):
        step([0, 1, 2])
