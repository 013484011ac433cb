"""The feed of a grpo stage: the order of its prompts, how they are read, and the held-out ones. Its objective draws by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.models.build import model_config
from terrace.objectives.interface import StageFeed
from terrace.recipe.identity import stage_hash
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.rl.prompts import PromptOrder, PromptReader, held_out
from terrace.rl.readiness import Readiness, identity_of
from terrace.worker.context import WorkerContext


@dataclass
class PromptFeed(StageFeed):
    """`stage_hash` is part of the identity of what an iteration keeps on disk."""

    order: Any = None  # PromptOrder
    reader: Any = None  # PromptReader
    tokenizer: TextTokenizer | None = None
    stage_hash: str = ""
    readiness: Any = None  # rl.readiness.Readiness


def open_feed(recipe: Recipe, stage_index: int, prepared: Any, context: WorkerContext) -> PromptFeed:
    """The feed of a stage from prepared data (data.prepare.PreparedData)."""
    stage = recipe.stages[stage_index]
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    order, reader = PromptOrder(recipe, stage_index, prepared), PromptReader(recipe, stage_index, prepared, tokenizer)
    kept_out = held_out(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind)
    identity, training = stage_hash(recipe, stage_index), order.may_draw()
    keys = sorted({*training, *(one.key for one in kept_out)})
    return PromptFeed(
        config=model_config(recipe.model, tokenizer),
        total_steps=order.iterations * (stage.grpo or GrpoOptions()).updates_per_rollout,
        stream=lambda start: iter(()),
        state=lambda _step: order.state(),
        restore=order.restore,
        held_out=kept_out,
        tokenizer_dir=prepared.tokenizer_dir,
        order=order,
        reader=reader,
        tokenizer=tokenizer,
        stage_hash=identity,
        readiness=Readiness(
            recipe, stage_index, prepared.indexes, reader, keys, training,
            identity_of(identity, order.fingerprint, keys, prepared.indexes),
        ),
    )
