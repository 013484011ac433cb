"""The vLLM engine of an RL stage: the policy goes to vLLM's worker tensor by tensor (`vllm_weights`), never through a file.

vLLM is opened on a directory that has all but weights (configuration, tokenizer, preprocessing). Beside a training engine on the same
GPU it sleeps (weights and cache dropped) during the policy step; on a CPU, and on a rollout worker of its own, it stays awake. Ids that
the tokenizer lacks are cut off the vocabulary that vLLM loads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from terrace.data.tokenizer import TextTokenizer
from terrace.families.configurations import language_config
from terrace.families.registry import make_family
from terrace.generation.interface import GroupReady, Prompt, Response, Sampling
from terrace.generation.vllm import Loading, Tokens, Vllm, require_vllm
from terrace.generation.vllm_folder import PrivateFolder, settled_bounds
from terrace.generation.vllm_weights import WeightStream
from terrace.models.build import meta_model
from terrace.models.export import ExportFiles, TensorPlan
from terrace.models.precision import DTYPE_NAMES, DTYPES
from terrace.recipe.schema import Stage
from terrace.worker.context import WorkerContext

GPU_MEMORY_SHARE = 0.5  # the rest stays with the training engine
GPU_MEMORY_SHARE_ALONE = 0.9  # a rollout worker of its own


class VllmEngine:
    """See interface.RolloutEngine. One engine per rank (tensor parallel 1), beside the training model on the same device, or
    `alone` in a rollout worker."""

    def __init__(
        self, stage: Stage, config: Any, tokenizer: TextTokenizer, forbidden: Sequence[int], stop: Sequence[int],
        context: WorkerContext, alone: bool = False,
    ) -> None:  # fmt: skip
        require_vllm(context.device)
        self._stage, self._tokenizer, self._context = stage, tokenizer, context
        self._family = make_family(config.model_type, config.to_dict())
        self._config = with_vocabulary(config, tokenizer.vocabulary_size)
        known = tuple(token for token in forbidden if token < language_config(self._config).vocab_size)
        self._tokens = Tokens(config.image_token_id, known, tuple(stop))
        self._sleeps = not alone and context.device.startswith("cuda")
        self._memory_share = GPU_MEMORY_SHARE_ALONE if alone else GPU_MEMORY_SHARE
        self._dtype = DTYPE_NAMES[stage.precision]
        self._private = PrivateFolder()
        self._shapes = {name: parameter.shape for name, parameter in meta_model(self._config).named_parameters()}
        self._pieces = TensorPlan(self._config, self._shapes, DTYPES[stage.precision]).pieces
        self._loaded: Vllm | None = None
        self._stream: WeightStream | None = None
        self._missing = set(self._shapes)  # of the weights that are under way

    @property
    def precisions(self) -> dict[str, torch.dtype]:
        """In which type it takes each tensor; they may come in parts."""
        return dict.fromkeys(self._shapes, DTYPES[self._stage.precision])

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        """Send tensors to vLLM as they come, all of the policy in one call or in several. The first ones open it."""
        if self._loaded is None:
            self._loaded = self._opened()
        for name, tensor in tensors():  # collective where the parameters are sharded: every rank goes through
            if self._stream is None:
                self._stream = self._loaded.open_weights(self._private.path)
            shape = self._shapes[name]
            known = tensor[: shape[0]] if shape else tensor  # ids that the tokenizer lacks are cut off
            for published, piece in self._pieces(name, known.detach()).items():
                self._stream.send(published, piece)
            self._missing.discard(name)
        if self._stream is not None and not self._missing:
            self._stream.finish()
            self._loaded.weights_are_in()
            self._stream, self._missing = None, set(self._shapes)

    def _opened(self) -> Vllm:
        folder = self._private.path / "model"
        folder.mkdir()
        bounds = settled_bounds(self._family, self._stage.pixels.max)
        ExportFiles(self._config, self._tokenizer.directory, bounds, self._dtype).write(folder)
        loading = Loading(
            folder, self._context.device, self._dtype, self._stage.sequence_length, self._stage.seed, self._memory_share, self._sleeps,
            awaits_weights=True,
        )  # fmt: skip
        return Vllm(loading, self._family, self._config, self._tokens)

    usage = None  # not known

    def generate(
        self, prompts: Iterable[Prompt | None], sampling: Sampling, ready: GroupReady | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:  # fmt: skip
        assert self._loaded is not None, "update_weights comes first"
        assert self._stream is None, f"update_weights has not brought {sorted(self._missing)[:3]}"
        return self._loaded.generate(prompts, sampling, ready, stop=stop)

    def together(self) -> AbstractContextManager[None]:
        """Each rank decodes on its own."""
        return nullcontext()

    def sleep(self) -> None:
        """Give the GPU's memory back for the policy step."""
        if self._loaded is not None:
            self._loaded.sleep()

    def wake(self) -> None:
        """`update_weights` wakes the engine."""

    def close(self) -> None:
        """End the engine, and remove the directory that it read."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None
        self._private.close()


def with_vocabulary(config: Any, count: int) -> Any:
    """The configuration with at most the first `count` token ids."""
    if count >= language_config(config).vocab_size:
        return config
    config = copy.deepcopy(config)
    for part in (config, language_config(config)):
        if getattr(part, "vocab_size", None) is not None:
            part.vocab_size = count
    return config
