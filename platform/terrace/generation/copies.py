"""Engines with weights of their own, for a model that no rank holds whole or that trains elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from terrace.data.tokenizer import TextTokenizer
from terrace.generation.interface import GroupReady, Prompt, Response, RolloutEngine, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.generation.usage import Usage
from terrace.models.attention import choose_backend
from terrace.models.build import materialise, meta_model
from terrace.models.head import LossHead
from terrace.models.precision import DTYPES
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.recipe.schema import Model as ModelSection
from terrace.recipe.schema import Stage
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.worker.context import WorkerContext


def open_copy_engine(
    section: ModelSection,
    stage: Stage,
    config: Any,
    tokenizer: TextTokenizer,
    context: WorkerContext,
    alone: bool = False,
) -> RolloutEngine:
    """An engine with weights of its own, which `update_weights` brings. `alone`: no training engine shares its device."""
    options = stage.grpo or GrpoOptions()
    forbidden, stop = forbidden_tokens(tokenizer, config), stop_tokens(tokenizer, config)
    if options.engine == "vllm":
        from terrace.generation.vllm_policy import VllmEngine

        return VllmEngine(stage, config, tokenizer, forbidden, stop, context, alone)
    copy = meta_model(config)
    backend, _ = choose_backend(section.attention, torch.device(context.device).type, stage.precision)
    copy = materialise(copy, _zeros_like(copy), context.device, torch.float32)
    use_shared_prompt_attention(copy, backend)
    lighten(copy, DTYPES[stage.precision])
    return EngineOnCopy(copy, NativeEngine(copy, forbidden, stop, context.device, stage.precision))


PLAIN = (torch.nn.Linear, LossHead)  # layers that only multiply


def lighten(model: Any, dtype: torch.dtype) -> None:
    """Keep what only linear layers read in the precision that they compute in: autocast would round it in every call, to the same.
    Embeddings, norms and what shares its tensor with them stay float32, as they are computed."""
    others = {
        id(parameter)
        for module in model.modules() if type(module) not in PLAIN for parameter in module.parameters(recurse=False)
    }  # fmt: skip
    for module in model.modules():
        if type(module) in PLAIN and not any(id(parameter) in others for parameter in module.parameters()):
            module.to(dtype)


def _zeros_like(model: Any) -> Callable[[str], torch.Tensor]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return lambda name: torch.zeros(shapes[name])


class EngineOnCopy:
    """The native engine on a whole copy of a model that is sharded or changes meanwhile, renewed every iteration, also while it decodes.

    `precisions` says in which type it takes each tensor: what a hand-over has to bring, and nothing more."""

    def __init__(self, model: Any, engine: NativeEngine) -> None:
        self._model, self._engine = model, engine

    def generate(
        self, prompts: Iterable[Prompt | None], sampling: Sampling, ready: GroupReady | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:  # fmt: skip
        return self._engine.generate(prompts, sampling, ready, stop=stop)

    def converse(self, *arguments: Any) -> list[list[Response]]:
        return self._engine.converse(*arguments)

    @property
    def precisions(self) -> dict[str, torch.dtype]:
        return {name: parameter.dtype for name, parameter in self._model.named_parameters()}

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        own = dict(self._model.named_parameters())
        with self._engine.replacing(version), torch.no_grad():
            for name, tensor in tensors():
                own[name].copy_(tensor)

    @property
    def usage(self) -> Usage:
        return self._engine.usage

    def sleep(self) -> None:
        """The copy stays."""

    def wake(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing is held outside this process."""
