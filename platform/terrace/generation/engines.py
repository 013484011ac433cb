"""Choosing the rollout engine of a stage, and the weights that it decodes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from terrace.data.tokenizer import TextTokenizer
from terrace.generation.interface import GroupReady, Prompt, Response, RolloutEngine, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.models.attention import choose_backend
from terrace.models.build import materialise, meta_model
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.recipe.schema import GrpoOptions, Recipe, Stage
from terrace.worker.context import WorkerContext

SHARDING = ("zero3", "fsdp")  # no rank holds whole parameters: the native engine decodes with a copy


def open_engine(
    recipe: Recipe,
    stage: Stage,
    model: Any,
    config: Any,
    tokenizer: TextTokenizer,
    stage_dir: Path,
    context: WorkerContext,
) -> RolloutEngine:
    """The engine that the recipe names. `model` is the one that trains, whole or in shards."""
    options = stage.grpo or GrpoOptions()
    if options.placement == "separate":
        from terrace.generation.separate import SeparateEngine

        return SeparateEngine(recipe, stage, tokenizer.directory, stage_dir, context)
    if options.engine == "native" and stage.parallel.strategy not in SHARDING:
        forbidden, stop = forbidden_tokens(tokenizer, config), stop_tokens(tokenizer)
        return NativeEngine(model, forbidden, stop, context.device, stage.precision)
    return open_copy_engine(recipe, stage, config, tokenizer, stage_dir, context)


def open_copy_engine(
    recipe: Recipe,
    stage: Stage,
    config: Any,
    tokenizer: TextTokenizer,
    stage_dir: Path,
    context: WorkerContext,
    alone: bool = False,
) -> RolloutEngine:
    """An engine with weights of its own, which `update_weights` brings. `alone`: no training engine shares its device."""
    options = stage.grpo or GrpoOptions()
    forbidden, stop = forbidden_tokens(tokenizer, config), stop_tokens(tokenizer)
    if options.engine == "vllm":
        from terrace.generation.vllm import VllmEngine

        return VllmEngine(stage, config, tokenizer, forbidden, stop, stage_dir, context, alone)
    copy = meta_model(config)
    backend, _ = choose_backend(recipe.model.attention, torch.device(context.device).type, stage.precision)
    copy = materialise(copy, _zeros_like(copy), context.device, torch.float32)
    use_shared_prompt_attention(copy, backend)
    return _EngineOnCopy(copy, NativeEngine(copy, forbidden, stop, context.device, stage.precision))


def _zeros_like(model: Any) -> Callable[[str], torch.Tensor]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return lambda name: torch.zeros(shapes[name])


class _EngineOnCopy:
    """The native engine on a whole copy of a sharded model (4 bytes per parameter and rank), renewed every
    iteration."""

    def __init__(self, model: Any, engine: NativeEngine) -> None:
        self._model, self._engine = model, engine

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, ready: GroupReady | None = None
    ) -> list[list[Response]]:
        return self._engine.generate(prompts, sampling, ready)

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        own = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors():
                own[name].copy_(tensor)

    def sleep(self) -> None:
        """The copy stays."""

    def wake(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing is held outside this process."""
