"""Stochastic depth: a sample goes past the attention or the feed-forward of a block, with chances that no process owns.

What a branch gives is multiplied by 0, or by 1 / (1 - chance) where it is kept. The factors come with the pictures
(objectives.chance.kept_paths). Hooks on the branches apply them; they are found again by the shape of what runs, because a block whose
activations are recomputed runs a second time in the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

BRANCHES = (("attention", "self_attn"), ("mlp",))  # names of a block's two branches in the classes of transformers
HELD = "_terrace_paths"


class Paths:
    """Of one tower, of L blocks."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        self._now: torch.Tensor | None = None  # [R, L, 2] of what runs at present
        self._seen: dict[tuple[int, ...], torch.Tensor] = {}
        for number, block in enumerate(blocks):
            for place, names in enumerate(BRANCHES):
                branch = next(getattr(block, name) for name in names if hasattr(block, name))
                branch.register_forward_hook(self._hook(number, place))

    def _hook(self, number: int, place: int) -> Any:
        def scale(module: Any, _inputs: Any, output: Any) -> Any:
            given = output[0] if isinstance(output, tuple) else output
            if self._now is not None:
                self._seen[tuple(given.shape[:2])] = self._now
            factors = self._seen.get(tuple(given.shape[:2])) if module.training else None
            if factors is None:
                return output
            scaled = given * factors[:, number, place].to(given.dtype).view(-1, 1, 1)
            return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

        return scale

    def forget(self) -> None:
        """Before another batch."""
        self._seen = {}

    @contextlib.contextmanager
    def running(self, factors: torch.Tensor | None) -> Iterator[None]:
        """While it lasts, rows [R, ...] that go through the tower have these factors [R, L, 2]."""
        self._now = factors
        try:
            yield
        finally:
            self._now = None


def paths_of(model: Any, blocks: Sequence[Any]) -> Paths:
    """Those of a model, whose hooks are set once."""
    found = model.__dict__.get(HELD)
    if found is None:
        found = model.__dict__[HELD] = Paths(blocks)
    return found
