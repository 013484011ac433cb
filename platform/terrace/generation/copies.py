"""Engines with weights of their own, for a model that no rank holds whole or that trains elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from terrace.data.tokenizer import TextTokenizer
from terrace.errors import TerraceError
from terrace.generation.interface import GroupReady, Prompt, Response, RolloutEngine, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.generation.usage import Usage
from terrace.models.attention import choose_backend
from terrace.models.build import meta_model, restore_buffers
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
    """An engine with weights of its own, which `update_weights` brings. `alone`: no training engine shares its device; the native engine
    beside one has weights only while it generates, unless it generates while the model trains."""
    options = stage.grpo or GrpoOptions()
    forbidden, stop = forbidden_tokens(tokenizer, config), stop_tokens(tokenizer, config)
    if options.engine == "vllm":
        from terrace.generation.vllm_policy import VllmEngine

        return VllmEngine(stage, config, tokenizer, forbidden, stop, context, alone)
    backend, _ = choose_backend(section.attention, torch.device(context.device).type, stage.precision)
    copy = empty_copy(config, context.device, DTYPES[stage.precision])
    use_shared_prompt_attention(copy, backend)
    overlapped = options.overlap is not None and options.overlap.max_staleness > 0
    engine = NativeEngine(copy, forbidden, stop, context.device, stage.precision, compiled=options.compile_decoding)
    return EngineOnCopy(copy, engine, stays=alone or overlapped)


def empty_copy(config: Any, device: str, dtype: torch.dtype) -> Any:
    """A model with memory as `lighten` leaves it, and nothing in it."""
    copy = meta_model(config)
    lighten(copy, dtype)
    copy.to_empty(device=device)
    copy.tie_weights()
    restore_buffers(copy)
    return copy.requires_grad_(False)


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


class EngineOnCopy:
    """The native engine on a whole copy of a model that is sharded or changes meanwhile, renewed every iteration, also while it decodes.

    Decoding runs every layer for every token, so the rank that decodes holds the weights whole while it does. Unless the copy `stays`, its
    memory is given back when the engine sleeps, and training never sees it: `update_weights` makes it anew. `precisions` says in which
    type it takes each tensor: what a hand-over has to bring, and nothing more."""

    def __init__(self, model: Any, engine: NativeEngine, stays: bool = True) -> None:
        self._model, self._engine, self._stays = model, engine, stays
        self._storages = [(parameter.untyped_storage(), parameter.untyped_storage().nbytes()) for parameter in model.parameters()]
        self.sleep()

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
        missing = set() if self._stays else set(own)  # a copy that stays may be renewed in parts
        for storage, size in self._storages:
            if storage.nbytes() != size:
                storage.resize_(size)
        with self._engine.replacing(version), torch.no_grad():
            for name, tensor in tensors():
                own[name].copy_(tensor)
                missing.discard(name)
        if missing:
            raise TerraceError(f"the rollout engine got no weights for {len(missing)} tensors, such as {min(missing)}")

    @property
    def usage(self) -> Usage:
        return self._engine.usage

    def sleep(self) -> None:
        """Give the copy's memory back, if it does not stay."""
        for storage, _ in () if self._stays else self._storages:
            storage.resize_(0)

    def wake(self) -> None:
        """`update_weights` makes the copy."""

    def close(self) -> None:
        """Nothing is held outside this process."""
