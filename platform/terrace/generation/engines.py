"""Choosing the rollout engine of a stage, and the weights that it decodes with."""

from __future__ import annotations

from typing import Any

from terrace.data.tokenizer import TextTokenizer
from terrace.generation.copies import open_copy_engine
from terrace.generation.interface import RolloutEngine
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.recipe.schema import Model as ModelSection
from terrace.recipe.schema import Stage
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.worker.context import WorkerContext

SHARDING = ("zero3", "fsdp")  # no rank holds whole parameters: the native engine decodes with a copy


def open_engine(
    section: ModelSection,
    stage: Stage,
    model: Any,
    config: Any,
    tokenizer: TextTokenizer,
    context: WorkerContext,
) -> RolloutEngine:
    """The engine that the recipe names. `model` is the one that trains, whole or in shards."""
    options = stage.grpo or GrpoOptions()
    if options.placement == "separate":
        from terrace.generation.separate import SeparateEngine

        return SeparateEngine(section, stage, tokenizer.directory, context)
    overlapped = options.overlap is not None and options.overlap.max_staleness > 0  # it decodes while the model itself changes
    if options.engine == "native" and stage.parallel.strategy not in SHARDING and not overlapped:
        forbidden, stop = forbidden_tokens(tokenizer, config), stop_tokens(tokenizer, config)
        return NativeEngine(model, forbidden, stop, context.device, stage.precision, compiled=options.compile_decoding)
    return open_copy_engine(section, stage, config, tokenizer, context)
