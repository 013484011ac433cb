"""Retrieval between pictures and texts by cosine: recall at 1, 5 and 10, both ways.

A text that stands beside several pictures is right for each of them. A wrong one as near as the right one counts as nearer,
so a model that gives everything the same vector finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PLACES = (1, 5, 10)
ROWS_AT_ONCE = 1024


def recalls(images: torch.Tensor, texts: torch.Tensor, captions: Sequence[object]) -> dict[str, float]:
    """`images` and `texts` [N, D], normalised; `captions` [N] says which texts are the same."""
    numbers, firsts = distinct_captions(captions, images.device)
    distinct, own = texts[firsts], torch.arange(len(firsts), device=images.device)
    found = {}
    for name, ranks in (
        ("image_to_text", wrong_before_right(images, numbers, distinct, own)),
        ("text_to_image", wrong_before_right(distinct, own, images, numbers)),
    ):
        found |= {f"{name}_r{place}": float((ranks < place).double().mean()) for place in PLACES}
    return found


def distinct_captions(captions: Sequence[object], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [N]: the number of each caption among the distinct ones; and int64 [C]: where each distinct one stands first."""
    first: dict[object, int] = {}
    numbers = torch.tensor([first.setdefault(caption, len(first)) for caption in captions], device=device)
    places = torch.zeros(len(first), dtype=torch.int64, device=device)
    places[numbers.flip(0)] = torch.arange(len(captions) - 1, -1, -1, device=device)
    return numbers, places


def recalls_of_scores(scores: torch.Tensor, captions: Sequence[object]) -> dict[str, float]:
    """Likewise of similarities [N, N] that are no product of two vectors: picture i with text j."""
    numbers, firsts = distinct_captions(captions, scores.device)
    own, distinct, found = torch.arange(len(firsts), device=scores.device), scores[:, firsts], {}
    for name, ranks in (
        ("image_to_text", ranks_of_right(distinct, numbers[:, None] == own[None])),
        ("text_to_image", ranks_of_right(distinct.T, own[:, None] == numbers[None])),
    ):
        found |= {f"{name}_r{place}": float((ranks < place).double().mean()) for place in PLACES}
    return found


def ranks_of_right(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """int64 [Q]: how many wrong keys are as near to each query as its nearest right one, or nearer."""
    best = scores.masked_fill(~right, -torch.inf).max(dim=1, keepdim=True).values
    return ((scores >= best) & ~right).sum(dim=1)


def wrong_before_right(queries: torch.Tensor, wanted: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """int64 [Q]: how many wrong keys are as near to each query as its nearest right one, or nearer."""
    ranks = []
    for start in range(0, len(queries), ROWS_AT_ONCE):
        scores = queries[start : start + ROWS_AT_ONCE] @ keys.T
        right = wanted[start : start + ROWS_AT_ONCE, None] == labels[None]
        ranks.append(ranks_of_right(scores, right))
    return torch.cat(ranks)
