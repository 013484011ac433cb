"""FSDP's choice between reducing gradients once a step and at every pack, made by the planner for the device that is there."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from terrace.planner.adapters import with_adapters
from terrace.planner.memory import accumulates, stage_memory, worst_pack
from terrace.planner.reduction import settled, with_reduction
from terrace.planner.shapes import shape_of_config
from terrace.planner.work import has_images
from terrace.recipe.schema import Recipe, Stage
from terrace.worker.collectives import gather_rows
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

GIB = 2**30


def settle_reduction(recipe: Recipe, stage: Stage, config: Any, context: WorkerContext) -> Stage:
    """The stage with `parallel.reduce_every_pack` decided, alike on every rank: the smallest device counts. Says so in the log where it is
    more than once a step. All ranks call it. On a CPU only the recipe can ask for it: nobody knows how much memory is this stage's."""
    if stage.parallel.strategy != "fsdp" or not accumulates(stage, context.world_size):
        return stage
    if stage.parallel.reduce_every_pack is not None:
        if stage.parallel.reduce_every_pack and context.rank == 0:
            log.info("stage %s: gradients are reduced at every pack: the recipe says so", stage.name)
        return stage
    shape = with_adapters(shape_of_config(config.to_dict(), config.model_type), stage, recipe.model, config)
    pack, on_gpu = worst_pack(stage, has_images(recipe, stage)), context.device.startswith("cuda")
    limit = float(gather_rows([_usable_bytes(context, recipe.planning.memory_margin)], context).min())
    found = settled(stage, shape, context.world_size, pack, limit, on_gpu)
    if found.parallel.reduce_every_pack and context.rank == 0:
        once, every = (
            stage_memory(shape, with_reduction(stage, every), context.world_size, pack, on_gpu).total / GIB for every in (False, True)
        )
        log.info(
            "stage %s: gradients are reduced at every pack (parallel.reduce_every_pack): planned %.3g GiB per GPU instead of %.3g, of %.3g",
            stage.name, every, once, limit / GIB,
        )  # fmt: skip
    return found


def _usable_bytes(context: WorkerContext, margin: float) -> float:
    """Memory of this rank's device that training may fill; no end of it on a CPU."""
    if not context.device.startswith("cuda"):
        return math.inf
    return torch.cuda.get_device_properties(context.device).total_memory * (1 - margin)
