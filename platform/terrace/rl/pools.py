"""Easy prompts: left out of the order once they are solved, and seen again now and then (MiMo-7B).

A prompt whose pass rate lies above `drop_above` (default with a pool: 1, every response right) leaves the order for the
pool. With probability `again` a place of the batch is then filled from the pool instead of the order, so that easy
skills are kept without paying for them at full rate. What is drawn depends on (seed, draw number) and the pool alone,
and the pool travels in the checkpoint: a resumed run draws the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from terrace.data.order.permutation import seed_of

PASS_REWARD = 0.75  # a response passes from this reward on: right for rules of 0 and 1, GIoU 0.5 under the default map


@dataclass
class EasyPool:
    """`members` maps (source, row) to its last pass rate, in the order of entry."""

    again: float = 0.0
    drop_above: float | None = None
    members: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Prompts with a pass rate above this are easy; above 1 none is."""
        if self.drop_above is not None:
            return self.drop_above
        return 1.0 - 1e-9 if self.again > 0 else 2.0

    def record(self, key: tuple[str, int], pass_rate: float) -> None:
        """A prompt's newest pass rate: it enters the pool, or leaves it when it has become hard again."""
        if pass_rate > self.limit:
            self.members[key] = pass_rate
        else:
            self.members.pop(key, None)

    def takes_out(self, key: tuple[str, int]) -> bool:
        """Whether the order passes over this prompt."""
        return key in self.members

    def pick(self, seed: int, draw: int) -> tuple[str, int] | None:
        """The pool's prompt for a draw, or None: take the next of the order."""
        if not self.members or self.again <= 0:
            return None
        value = seed_of(seed, "easy pool", draw)
        if (value >> 32) / 2**32 >= self.again:
            return None
        return list(self.members)[(value & 0xFFFFFFFF) % len(self.members)]

    def state(self) -> list[list[Any]]:
        return [[source, row, rate] for (source, row), rate in self.members.items()]

    def restore(self, state: list[list[Any]]) -> None:
        self.members = {(source, int(row)): float(rate) for source, row, rate in state}
