"""The feed of a reward-model stage: pairs drawn in the order of prompts, this rank's read and laid out as packs.

A batch is `batch.packs` pairs over all workers; every rank draws the same and reads every world_size-th of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from terrace.data.tokenizer import load_tokenizer
from terrace.models.build import model_config
from terrace.objectives.interface import StageFeed, StepExamples
from terrace.recipe.schema import Recipe
from terrace.rl.pairs import Pair, lay_out, pack_pairs
from terrace.rl.prompts import Drawn, PairReader, PromptOrder, held_out
from terrace.worker.context import WorkerContext


def open_feed(recipe: Recipe, stage_index: int, prepared: Any, context: WorkerContext) -> StageFeed:
    """The feed of a stage from prepared data (data.prepare.PreparedData)."""
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    order, reader = pair_order(recipe, stage_index, prepared), PairReader(recipe, stage_index, prepared, tokenizer)
    return StageFeed(**feed_fields(recipe, stage_index, prepared, context, order, reader, lay_out))


def pair_order(recipe: Recipe, stage_index: int, prepared: Any) -> PromptOrder:
    """The order of a stage of pairs, from its beginning."""
    return PromptOrder(recipe, stage_index, prepared, draws_per_step=recipe.stages[stage_index].batch.packs, reserved_tokens=0)


def feed_fields(
    recipe: Recipe, stage_index: int, prepared: Any, context: WorkerContext, order: PromptOrder, reader: PairReader,
    lay_out: Callable[[Sequence[Pair]], Any],
) -> dict[str, Any]:  # fmt: skip
    """The fields of a StageFeed whose examples are packs of pairs, as `lay_out` makes them."""
    stage = recipe.stages[stage_index]
    kept_out = held_out(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind)

    def packs(drawn: Sequence[Drawn]) -> tuple[list[Any], int]:
        """This rank's share as packs, and how many of it could not be read."""
        return read_packs(drawn[context.rank :: context.world_size], reader, stage.sequence_length, lay_out)

    def stream(start: int) -> Iterator[StepExamples]:
        for step in range(start, order.iterations):
            started = time.perf_counter()
            examples, damaged = packs(order.draw(stage.batch.packs, Counter()))
            yield StepExamples(step, examples, time.perf_counter() - started, damaged_samples=damaged)

    return {
        "config": model_config(recipe.model, load_tokenizer(prepared.tokenizer_dir)),
        "total_steps": order.iterations,
        "stream": stream,
        "state": lambda _step: order.state(),
        "restore": order.restore,
        "held_out": lambda: packs(kept_out)[0],
        "tokenizer_dir": prepared.tokenizer_dir,
    }


def read_packs(
    drawn: Sequence[Drawn], reader: PairReader, sequence_length: int, lay_out: Callable[[Sequence[Pair]], Any]
) -> tuple[list[Any], int]:
    """The references as packs, and how many of them could not be read."""
    usable, damaged = reader.read_usable(drawn)
    return [lay_out(pairs) for pairs in pack_pairs([pair for _, pair in usable], sequence_length)], len(damaged)
