"""Rows that all ranks hold parts of, brought together in the order of the global batch: by pack, and by place in it.

That order depends neither on how many ranks there are nor on how packs are dealt to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from terrace.data.types import PackedExample
from terrace.worker.collectives import gather_rows, gather_tensors
from terrace.worker.context import WorkerContext

PACK = 2**32  # more than a pack has rows


class Together:
    """Every rank makes one of its own packs, in the order in which it will give their rows."""

    def __init__(self, packs: Sequence[PackedExample], context: WorkerContext) -> None:
        self._context = context
        places = [max(pack.pack, 0) * PACK + row for pack in packs for row in range(len(pack.sample_ids))]
        self.counts = [int(count) for count in gather_rows([float(len(places))], context)[:, 0]]
        own = torch.tensor(places, dtype=torch.int64, device=context.device)
        everything = gather_tensors(own, self.counts, context)
        self._order = everything.argsort()
        first = sum(self.counts[: context.rank])
        self.own = self._order.argsort()[first : first + len(places)]  # where this rank's rows stand among all

    def rows(self, own: torch.Tensor) -> torch.Tensor:
        """[all rows, ...] of this rank's [rows, ...]."""
        return gather_tensors(own.contiguous(), self.counts, self._context)[self._order]
