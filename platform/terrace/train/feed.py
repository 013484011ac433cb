"""What the loop needs from the data path, as one value: how many steps, this rank's packs, the place in the order.

The loop takes a feed and does not care where packs come from, so a benchmark or a test trains on packs made in memory
and needs neither shards nor Ray. `open_feed` makes the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from terrace.data.types import PackedExample
from terrace.recipe.schema import Recipe
from terrace.train.context import WorkerContext, data_place


class StepInput(Protocol):
    """This rank's packs of one step (`step` counts from 0), and how long the loop waited for them."""

    step: int
    packs: list[PackedExample]
    wait_seconds: float


@dataclass
class StageFeed:
    """`stream(start)` yields the steps from `start` to the last one. `state(step)` is the place in the data order after
    `step` steps, a few integers that a checkpoint keeps; `restore(state)` accepts it again, and raises InputError if
    the order is another one by now."""

    config: Any  # the model's transformers configuration, token ids filled in
    total_steps: int
    stream: Callable[[int], Iterator[StepInput]]
    state: Callable[[int], dict[str, Any]]
    restore: Callable[[dict[str, Any]], None]
    held_out: Mapping[str, Sequence[PackedExample]] = field(default_factory=dict)  # per sample kind
    tokenizer_dir: Path | None = None


def open_feed(recipe: Recipe, stage_index: int, prepared: Any, context: WorkerContext) -> StageFeed:
    """The feed of a stage from prepared data (data.prepare.PreparedData)."""
    from terrace.data.order.held_out import held_out_packs
    from terrace.data.order.plan import StagePlan
    from terrace.data.stream.rank_stream import open_stream
    from terrace.data.tokenizer import load_tokenizer
    from terrace.models.build import model_config

    stage = recipe.stages[stage_index]
    plan = StagePlan.build(recipe, stage_index, prepared)
    rank, ranks = data_place(context, stage.parallel.sequence_parallel)

    def stream(start_step: int) -> Iterator[StepInput]:
        engine = stage.data_loading.engine
        return open_stream(plan, prepared, rank, ranks, start_step, engine, readers=context.world_size)

    return StageFeed(
        config=model_config(recipe.model, load_tokenizer(prepared.tokenizer_dir)),
        total_steps=plan.total_steps,
        stream=stream,
        state=plan.state,
        restore=plan.restore,
        held_out=held_out_packs(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind),
        tokenizer_dir=prepared.tokenizer_dir,
    )
