"""The feed of a stage on packs: from prepared data through the plan and the stream to this rank's steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from terrace.objectives.interface import StageFeed
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext, data_place


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

    def stream(start_step: int) -> Iterator[Any]:
        engine = stage.data_loading.engine
        return open_stream(plan, prepared, rank, ranks, start_step, engine, readers=context.world_size)

    return StageFeed(
        config=model_config(recipe.model, load_tokenizer(prepared.tokenizer_dir)),
        total_steps=lambda: plan.total_steps,
        stream=stream,
        state=plan.state,
        restore=plan.restore,
        held_out=held_out_packs(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind),
        tokenizer_dir=prepared.tokenizer_dir,
    )
