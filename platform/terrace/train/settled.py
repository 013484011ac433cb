"""What a recipe leaves to the planner and the planner decides for the devices that are there, alike on every rank: whether FSDP reduces
gradients at every pack, and whether the copy of a policy that decodes is divided by the ranks.

The smallest device counts. On a CPU only the recipe can ask for either: nobody knows how much memory is this stage's.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from terrace.families.shapes import ModelShape
from terrace.planner.adapters import with_adapters
from terrace.planner.memory import COMPUTE_BYTES, Memory, PackSize, accumulates, stage_memory, worst_pack
from terrace.planner.reduction import settled, with_reduction
from terrace.planner.rollouts import settled_copy
from terrace.planner.second_models import can_be_divided, copy_bytes
from terrace.planner.shapes import shape_of_config
from terrace.planner.work import has_images
from terrace.recipe.schema import Recipe, Stage
from terrace.worker.collectives import gather_rows
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

GIB = 2**30


def settle(recipe: Recipe, stage: Stage, config: Any, context: WorkerContext) -> Stage:
    """The stage with both decided; the log of rank 0 says what is divided. All ranks call it."""
    reduces, copies = stage.parallel.strategy == "fsdp" and accumulates(stage, context.world_size), can_be_divided(stage)
    if not reduces and not copies:
        return stage
    shape = with_adapters(shape_of_config(config.to_dict(), config.model_type), stage, recipe.model, config)
    pack, on_gpu = worst_pack(stage, has_images(recipe, stage)), context.device.startswith("cuda")
    limit = float(gather_rows([_usable_bytes(context, recipe.planning.memory_margin)], context).min())
    if reduces:
        stage = _reduction(stage, shape, context, pack, limit, on_gpu)
    return _copy(stage, shape, context, stage_memory(shape, stage, context.world_size, pack, on_gpu), limit) if copies else stage


def _reduction(stage: Stage, shape: ModelShape, context: WorkerContext, pack: PackSize, limit: float, on_gpu: bool) -> Stage:
    found = settled(stage, shape, context.world_size, pack, limit, on_gpu)
    if found.parallel.reduce_every_pack and context.rank == 0:
        once, every = (
            stage_memory(shape, with_reduction(stage, every), context.world_size, pack, on_gpu).total / GIB for every in (False, True)
        )
        planned = f"planned {every:.3g} GiB per GPU instead of {once:.3g}, of {limit / GIB:.3g}"
        why = "the recipe says so" if stage.parallel.reduce_every_pack else planned
        log.info("stage %s: gradients are reduced at every pack (parallel.reduce_every_pack): %s", stage.name, why)
    return found


def _copy(stage: Stage, shape: ModelShape, context: WorkerContext, memory: Memory, limit: float) -> Stage:
    found, asked = settled_copy(stage, shape, context.world_size, memory, limit), stage.grpo and stage.grpo.shard_copy
    if found.grpo is not None and found.grpo.shard_copy and context.rank == 0:
        whole = copy_bytes(shape, COMPUTE_BYTES[stage.precision]) / GIB
        why = "the recipe says so" if asked else f"a whole one takes {whole:.3g} GiB of {limit / GIB:.3g} per GPU"
        log.info("stage %s: the copy that decodes is divided by the workers (grpo.shard_copy): %s", stage.name, why)
    return found


def _usable_bytes(context: WorkerContext, margin: float) -> float:
    """Memory of this rank's device that training may fill; no end of it on a CPU."""
    if not context.device.startswith("cuda"):
        return math.inf
    return torch.cuda.get_device_properties(context.device).total_memory * (1 - margin)
