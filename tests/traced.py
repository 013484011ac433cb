"""Compiled blocks without kernels: the same division into graphs and the same autograd, made in a fraction of the time."""

from __future__ import annotations

from typing import Any

import torch

from terrace.models import compiled
from terrace.models.compiled import Graphs


class Traced(Graphs):
    """Graphs that run operation by operation."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def train_each_traced(rank: int, world_size: int, recipes: dict[str, dict[str, Any]], out: str) -> list[int]:
    """`ranks.train_each` without kernels; the numbers of graphs after each recipe."""
    from ranks import train_each

    compiled.GRAPHS.__class__ = Traced
    counts = []
    for name, values in recipes.items():
        train_each(rank, world_size, {name: values}, out)
        counts.append(compiled.GRAPHS.count)
    return counts


def continue_traced(rank: int, world_size: int, recipes: dict[str, dict[str, Any]], saved: str, out: str) -> None:
    from ranks import continue_copies

    compiled.GRAPHS.__class__ = Traced
    continue_copies(rank, world_size, recipes, saved, out)
