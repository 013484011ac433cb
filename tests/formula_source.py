"""Sources made of a formula, and a stage over them: plans of any size without an index."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from terrace.data.order.items import Items
from terrace.data.order.permutation import mix64
from terrace.recipe.schema import Stage


@dataclass
class FormulaSource:
    """A source of any size whose lengths are a hash of the row: an index that is never materialised."""

    name: str
    count: int
    longest: int = 400
    mean_tokens: float = 0.0
    changes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self.mean_tokens = self.mean_tokens or (self.longest + 20) / 2

    def take(self, numbers):
        with np.errstate(over="ignore"):
            lengths = 20 + (mix64(numbers.astype(np.uint64), 7) % np.uint64(self.longest - 19)).astype(np.int64)
        zero = np.zeros_like(numbers)
        return Items(numbers, lengths, lengths // 3, lengths // 3 * 4, zero, zero, zero - 1)

    def id_of(self, row):
        return f"{self.name}-{row}"


def stage(**changes) -> Stage:
    values = {
        "name": "one",
        "train": {"projector": {"lr": 1e-3}},
        "mixture": {"weights": {"a": 0.7, "b": 0.3}},
        "sequence_length": 1024,
        "budget": {"steps": 30},
        "batch": {"packs": 14},
        "data_loading": {"window_samples": 200},
    }
    return Stage.model_validate(values | changes)


def seen(packs) -> Counter:
    return Counter((ref.source, ref.row) for pack in packs for ref in pack.samples)
