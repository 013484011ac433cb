"""Out of memory, in words: the pack that did it, what the device held, and the cheapest change that makes room.

The change comes from the planner: the first in its order of pain that needs at least a tenth less than the stage's
present settings for this very pack, so it helps even where the planner's absolute figures are off.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from terrace.data.types import PackedExample
from terrace.errors import TerraceError
from terrace.families.shapes import ModelShape
from terrace.planner.changes import nearest_changes
from terrace.planner.memory import PackSize, stage_memory
from terrace.planner.shapes import shape_of_config
from terrace.recipe.schema import PARTS, Stage
from terrace.worker.context import WorkerContext

GIB = 2**30
ROOM = 0.9  # of what the present settings need, by the plan
ELSEWHERE = "or lower sequence_length, pixels.max or data_loading.max_visual_tokens_per_pack (a new run directory)"


class OutOfMemory(TerraceError):
    """The device (or the host) ran out of memory in a step."""


@contextlib.contextmanager
def memory_explained(
    doing: str, step: int, stage: Stage, config: Any, context: WorkerContext, pack: PackedExample | None = None
) -> Iterator[None]:
    """Raise OutOfMemory, with advice, where the block runs out of memory. `step` counts from 1."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_message(doing, step, stage, config, context, pack, error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # what PyTorch's CPU allocator says
            raise
        raise OutOfMemory(_message(doing, step, stage, config, context, pack, error)) from error


def _message(
    doing: str, step: int, stage: Stage, config: Any, context: WorkerContext, pack: PackedExample | None, error: Exception
) -> str:
    lines = [f"stage {stage.name}, step {step}, rank {context.rank}: out of memory in {doing} ({held(context)})."]
    if pack is not None:
        lines.append(composition(pack) + ".")
    lines.append(advice(stage, config, context, pack) + ".")
    lines.append(str(error).splitlines()[0])
    return " ".join(lines)


def held(context: WorkerContext) -> str:
    """What the device holds now."""
    if not context.device.startswith("cuda") or not torch.cuda.is_available():
        return f"device {context.device}"
    free, total = torch.cuda.mem_get_info(context.device)
    allocated, reserved = torch.cuda.memory_allocated(context.device), torch.cuda.memory_reserved(context.device)
    return (
        f"{context.device}: {allocated / GIB:.1f} GiB in tensors, {(reserved - allocated) / GIB:.1f} GiB kept by the allocator, "
        f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    )


def composition(pack: PackedExample) -> str:
    """What a pack is made of, largest parts named."""
    lengths = np.diff(np.asarray(pack.segment_ends), prepend=0)
    sources = ", ".join(f"{count} of {source}" for source, count in Counter(pack.sources).most_common(8))
    text = f"Pack {pack.pack}: {pack.tokens} tokens, {pack.supervised_tokens} supervised, in {len(pack.sample_ids)} samples ({sources})"
    if len(lengths):
        longest = int(lengths.argmax())
        text += f", the longest {int(lengths[longest])} tokens ({pack.sample_ids[longest]})"
    if len(pack.image_tokens):
        text += f"; {pack.visual_tokens} visual tokens of {len(pack.image_tokens)} images, the largest {pack.image_tokens.max()}"
    return text


def advice(stage: Stage, config: Any, context: WorkerContext, pack: PackedExample | None) -> str:
    """What to change, as overrides of the recipe."""
    shape: ModelShape = shape_of_config(config.to_dict(), config.model_type)
    ring = stage.parallel.sequence_parallel
    if pack is None:
        size = PackSize(stage.sequence_length / ring, stage.sequence_length / ring, stage.sequence_length / ring)
    else:
        size = PackSize(pack.tokens / ring, max(1.0, pack.visual_tokens / ring), max(1.0, pack.supervised_tokens / ring))
    on_gpu = context.device.startswith("cuda")
    before = stage_memory(shape, stage, context.world_size, size, on_gpu)
    changes = nearest_changes(stage, shape, context.world_size, size, ROOM * before.total)
    if not changes:
        return f"Set activation_checkpointing for the parts that train ({', '.join(_trained(stage))}), {ELSEWHERE}"
    options = [
        f"{' '.join(change.describe(stage.name, context.world_size))} (planned {before.total / GIB:.2g} -> "
        f"{change.memory.total / GIB:.2g} GiB)"
        for change in changes
        if change.memory is not None
    ]
    return f"Set {', or '.join(options)}; {ELSEWHERE}"


def _trained(stage: Stage) -> list[str]:
    return [part for part in PARTS if getattr(stage.train, part) is not None]
