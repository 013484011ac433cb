"""The feed of a reward-model stage: pairs drawn in the order of prompts, this rank's read and laid out as packs.

A batch is `batch.packs` pairs over all workers; every rank draws the same and reads every world_size-th of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from terrace.data.tokenizer import load_tokenizer
from terrace.models.build import model_config
from terrace.objectives.interface import StageFeed, StepExamples
from terrace.objectives.reward_model import PairPack
from terrace.recipe.schema import Recipe
from terrace.rl.pairs import lay_out, pack_pairs
from terrace.rl.prompts import Drawn, PairReader, PromptOrder, held_out
from terrace.worker.context import WorkerContext


def open_feed(recipe: Recipe, stage_index: int, prepared: Any, context: WorkerContext) -> StageFeed:
    """The feed of a stage from prepared data (data.prepare.PreparedData)."""
    stage = recipe.stages[stage_index]
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    order = PromptOrder(recipe, stage_index, prepared, draws_per_step=stage.batch.packs, reserved_tokens=0)
    reader = PairReader(recipe, stage_index, prepared, tokenizer)
    kept_out = held_out(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind)

    def packs(drawn: Sequence[Drawn]) -> tuple[list[PairPack], int]:
        """This rank's share as packs, and how many of it could not be read."""
        usable, damaged = reader.read_usable(drawn[context.rank :: context.world_size])
        return [lay_out(pairs) for pairs in pack_pairs([pair for _, pair in usable], stage.sequence_length)], len(damaged)

    def stream(start: int) -> Iterator[StepExamples]:
        for step in range(start, order.iterations):
            started = time.perf_counter()
            examples, damaged = packs(order.draw(stage.batch.packs, Counter()))
            yield StepExamples(step, examples, time.perf_counter() - started, damaged_samples=damaged)

    return StageFeed(
        config=model_config(recipe.model, tokenizer),
        total_steps=order.iterations,
        stream=stream,
        state=lambda _step: order.state(),
        restore=order.restore,
        held_out=lambda: packs(kept_out)[0],
        tokenizer_dir=prepared.tokenizer_dir,
    )
