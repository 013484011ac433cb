"""When FSDP reduces gradients: once a step, which keeps whole float32 ones on every worker until the last of several packs, or at
every pack.

Once a step costs one exchange of gradients instead of one per pack, so it is chosen wherever it fits.
"""

from __future__ import annotations

from terrace.families.shapes import ModelShape
from terrace.planner.memory import PackSize, accumulates, stage_memory
from terrace.recipe.schema import Stage


def settled(stage: Stage, shape: ModelShape, workers: int, pack: PackSize, limit: float | None, on_gpu: bool = True) -> Stage:
    """The stage with `parallel.reduce_every_pack` decided where it leaves that open: whether whole gradients need more than `limit` bytes
    of a GPU (None: there is no limit)."""
    if stage.parallel.strategy != "fsdp" or stage.parallel.reduce_every_pack is not None:
        return stage
    needed = accumulates(stage, workers) and workers > 1 and limit is not None
    once = with_reduction(stage, False)
    return with_reduction(stage, True) if needed and stage_memory(shape, once, workers, pack, on_gpu).total > limit else once


def with_reduction(stage: Stage, every_pack: bool) -> Stage:
    return stage.model_copy(update={"parallel": stage.parallel.model_copy(update={"reduce_every_pack": every_pack})})


def reduces_every_pack(stage: Stage, workers: int) -> bool:
    """Whether a settled stage exchanges gradients more than once a step."""
    return stage.parallel.strategy == "fsdp" and bool(stage.parallel.reduce_every_pack) and accumulates(stage, workers)
