"""The feed of dpo, mpo, kto, orpo and simpo: rows drawn as a reward model draws its pairs, laid out for log-probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from terrace.data.tokenizer import load_tokenizer
from terrace.objectives.preference import AnswerFeed
from terrace.recipe.schema import Recipe
from terrace.rl.pair_feed import feed_fields, pair_order, read_packs
from terrace.rl.pairs import lay_out_answers, row_name
from terrace.rl.prompts import Drawn, LabelledReader, PairReader, held_out
from terrace.worker.context import WorkerContext


def open_feed(recipe: Recipe, stage_index: int, prepared: Any, context: WorkerContext) -> AnswerFeed:
    """The feed of a stage from prepared data (data.prepare.PreparedData)."""
    stage, tokenizer = recipe.stages[stage_index], load_tokenizer(prepared.tokenizer_dir)
    order = pair_order(recipe, stage_index, prepared)
    labelled = stage.objective == "kto"
    reader = (
        LabelledReader(recipe, stage_index, prepared, tokenizer, order.following)
        if labelled
        else PairReader(recipe, stage_index, prepared, tokenizer)
    )

    def rows() -> list[Drawn]:
        """Every row that a step draws, in the order of first draws, then the held-out ones."""
        whole = pair_order(recipe, stage_index, prepared)
        seen: dict[tuple[str, int], None] = {}
        for _ in range(whole.iterations):
            seen |= dict.fromkeys(one.key for one in whole.draw(stage.batch.packs, Counter()))
        seen |= dict.fromkeys(one.key for one in held_out(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind))
        return [Drawn(key, 0) for key in seen]

    def read(drawn: Sequence[Drawn]) -> list[Any]:
        return read_packs(drawn, reader, stage.sequence_length, lay_out_answers)[0]

    return AnswerFeed(
        **feed_fields(recipe, stage_index, prepared, context, order, reader, lay_out_answers),
        rows=rows,
        name=lambda one: row_name(*one.key, prepared.indexes[one.key[0]].location(one.key[1]).id),
        read=read,
    )
