"""The feed of a stage on packs: from prepared data through the plan and the stream to this rank's steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from terrace.objectives.interface import StageFeed
from terrace.recipe.schema import Recipe
from terrace.worker.collectives import gather_objects
from terrace.worker.context import WorkerContext, data_place

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from terrace.data.order.plan import StagePlan
    from terrace.data.stream.machine_plan import Planner, PlannerClient


def open_feed(recipe: Recipe, stage_index: int, prepared: Any, context: WorkerContext) -> StageFeed:
    """The feed of a stage from prepared data (data.prepare.PreparedData)."""
    from terrace.data.order.fixed import plan_of
    from terrace.data.stream.held_out import held_out_packs
    from terrace.data.stream.rank_stream import open_stream
    from terrace.data.tokenizer import load_tokenizer
    from terrace.models.build import model_config

    stage = recipe.stages[stage_index]
    plan = plan_of(recipe, stage_index, prepared)
    rank, ranks = data_place(context, stage.parallel.sequence_parallel)
    planner = machine_planner(plan, ranks, stage.parallel.sequence_parallel, context)

    def stream(start_step: int) -> Iterator[Any]:
        engine = stage.data_loading.engine
        planner.total_steps()
        return open_stream(plan, prepared, rank, ranks, start_step, engine, readers=context.world_size, hand=planner.hand)

    return StageFeed(
        config=model_config(recipe.model, load_tokenizer(prepared.tokenizer_dir)),
        total_steps=planner.total_steps,
        stream=stream,
        state=planner.state,
        restore=planner.restore,
        held_out=held_out_packs(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind),
        tokenizer_dir=prepared.tokenizer_dir,
    )


def machine_planner(plan: StagePlan, ranks: int, sequence_parallel: int, context: WorkerContext) -> Planner | PlannerClient:
    """Who plans for this rank: itself where it is alone on its machine, else local rank 0 of the machine. Every rank calls it."""
    from terrace.data.stream.machine_plan import Planner, PlannerClient, PlannerServer

    if context.world_size == 1 or not torch.distributed.is_initialized():
        return Planner(plan, ranks, [context.rank // sequence_parallel])
    firsts = gather_objects(context.rank - context.local_rank, context)  # a machine's ranks are neighbours
    local = [rank for rank, first in enumerate(firsts) if first == context.rank - context.local_rank]
    planner = server = None
    if context.local_rank == 0:
        planner = Planner(plan, ranks, [rank // sequence_parallel for rank in local])
        server = PlannerServer(planner, len(local) - 1) if len(local) > 1 else None
    address = gather_objects(server.address if server else None, context)[context.rank - context.local_rank]
    if planner is not None:
        return planner
    try:
        return PlannerClient(plan, address, context.local_rank)
    except OSError as error:
        log.warning("rank %d plans by itself: local rank 0 does not answer at %s (%s)", context.rank, address.socket, error)
        return Planner(plan, ranks, [context.rank // sequence_parallel])
