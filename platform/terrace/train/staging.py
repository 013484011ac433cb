"""Host memory into which a checkpoint is copied before it is written, kept from one checkpoint to the next.

Training waits for the copies alone. From a GPU they go into pinned memory without a wait between them; pinning costs more than copying, and
a buffer that is there already costs neither. Held: 4 bytes for every number of this rank's shards, between checkpoints too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from terrace.train.strategies.shards import Shard


class Staging:
    """Buffers by kind and stretch. What `copies` gave is overwritten by the next call for the same kind."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}

    def copies(self, kind: str, shards: Iterable[Shard]) -> list[Shard]:
        """Shards in host memory, in float32 or as they are; on a GPU they are complete only after `wait`."""
        copied = []
        for shard in shards:
            values = shard.values
            buffer = self._buffers.get((kind, shard.name))
            if buffer is None or len(buffer) != len(values) or buffer.dtype != values.dtype:
                buffer = torch.empty(len(values), dtype=values.dtype, pin_memory=values.is_cuda)
                self._buffers[kind, shard.name] = buffer
            buffer.copy_(values, non_blocking=values.is_cuda)
            copied.append(Shard(shard.name, shard.shape, shard.start, buffer))
        return copied

    @staticmethod
    def wait() -> None:
        """Until the copies from the GPU are there."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
