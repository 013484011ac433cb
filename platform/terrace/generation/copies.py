"""Engines with weights of their own, for a model that no rank holds whole or that trains elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from terrace.data.tokenizer import TextTokenizer
from terrace.errors import TerraceError
from terrace.generation.interface import GroupReady, Prompt, Response, RolloutEngine, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.sharded_weights import ShardedWeights, resize
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
    copy = light_copy(config, DTYPES[stage.precision])
    weights = ShardedWeights(copy, context) if options.shard_copy and not alone else WholeWeights(copy, context.device)
    use_shared_prompt_attention(copy, backend)
    overlapped = options.overlap is not None and options.overlap.max_staleness > 0
    engine = NativeEngine(copy, forbidden, stop, context.device, stage.precision, compiled=options.compile_decoding)
    return EngineOnCopy(weights, engine, stays=alone or overlapped)


def light_copy(config: Any, dtype: torch.dtype) -> Any:
    """A model on the meta device as `lighten` leaves it: no tensor has memory."""
    copy = meta_model(config)
    lighten(copy, dtype)
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


class Weights(Protocol):
    """Tensors of a copy, whose memory comes and goes. `precisions` says in which type it takes each: what a hand-over has to bring."""

    precisions: dict[str, torch.dtype]

    def reserve(self) -> None:
        """Make room for what this rank keeps."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Take over one whole tensor, or what this rank keeps of it."""

    def release(self) -> None:
        """Give the memory back."""

    def together(self) -> AbstractContextManager[None]:
        """See interface.RolloutEngine."""


class WholeWeights:
    """A whole model on every rank: decoding runs every layer for every token."""

    def __init__(self, model: Any, device: str) -> None:
        """`model`: on the meta device; it gets memory."""
        model.to_empty(device=device)
        model.tie_weights()
        restore_buffers(model)
        model.requires_grad_(False)
        self._own = dict(model.named_parameters())
        self.precisions = {name: parameter.dtype for name, parameter in self._own.items()}
        self._sizes = {name: parameter.untyped_storage().nbytes() for name, parameter in self._own.items()}

    def reserve(self) -> None:
        for name, parameter in self._own.items():
            resize(parameter, self._sizes[name])

    def put(self, name: str, tensor: torch.Tensor) -> None:
        self._own[name].copy_(tensor)

    def release(self) -> None:
        for parameter in self._own.values():
            resize(parameter, 0)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


class EngineOnCopy:
    """The native engine on a copy of a model that is sharded or changes meanwhile, renewed every iteration, also while it decodes.

    Unless the copy `stays`, its memory is given back when the engine sleeps, and training never sees it: `update_weights` makes it anew."""

    def __init__(self, weights: Weights, engine: NativeEngine, stays: bool = True) -> None:
        self._weights, self._engine, self._stays = weights, engine, stays
        self.precisions = weights.precisions
        self.together = weights.together
        self.sleep()

    def generate(
        self, prompts: Iterable[Prompt | None], sampling: Sampling, ready: GroupReady | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:  # fmt: skip
        return self._engine.generate(prompts, sampling, ready, stop=stop)

    def converse(self, *arguments: Any) -> list[list[Response]]:
        return self._engine.converse(*arguments)

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        missing = set() if self._stays else set(self.precisions)  # a copy that stays may be renewed in parts
        self._weights.reserve()
        with self._engine.replacing(version), torch.no_grad():
            for name, tensor in tensors():
                self._weights.put(name, tensor)
                missing.discard(name)
        if missing:
            raise TerraceError(f"the rollout engine got no weights for {len(missing)} tensors, such as {min(missing)}")

    @property
    def usage(self) -> Usage:
        return self._engine.usage

    def sleep(self) -> None:
        """Give the copy's memory back, if it does not stay."""
        if not self._stays:
            self._weights.release()

    def wake(self) -> None:
        """`update_weights` makes the copy."""

    def close(self) -> None:
        """Nothing is held outside this process."""
