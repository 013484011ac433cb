"""The vLLM engine of an RL stage: the policy goes to vLLM as a Hugging Face directory on the machine's own disk.

Beside a training engine on the same GPU it sleeps (weights and cache dropped) during the policy step; on a CPU, and on a
rollout worker of its own, it stays awake. Ids that the tokenizer lacks are cut off the vocabulary that vLLM loads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from terrace.data.tokenizer import TextTokenizer
from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.families.registry import make_family
from terrace.generation.interface import GroupReady, Prompt, Response, Sampling
from terrace.generation.vllm import Loading, Tokens, Vllm, require_vllm
from terrace.generation.vllm_folder import PrivateFolder, settled_bounds
from terrace.models.build import meta_model
from terrace.models.export import export_hf
from terrace.models.precision import DTYPE_NAMES
from terrace.recipe.schema import Stage
from terrace.worker.collectives import barrier, gather_objects
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
        self._rows = first_rows(self._config)
        self._dtype = DTYPE_NAMES[stage.precision]
        self._private = PrivateFolder() if context.local_rank == 0 else None
        paths = gather_objects(self._private.path if self._private else None, context)
        path = paths[context.rank - context.local_rank] if context.world_size > 1 else paths[0]  # a machine's ranks are neighbours
        if path is None or not path.is_dir():
            raise InputError(f"engine vllm: rank {context.rank} does not see the weights of its machine's first rank ({path})")
        self._folder = path / "model"
        self._loaded: Vllm | None = None

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        """Write the policy as a Hugging Face directory, once per machine, and let vLLM read it (again)."""
        state = {}
        for name, tensor in tensors():  # collective where the parameters are sharded: every rank goes through
            if self._private is not None:
                known = tensor[: self._rows[name]] if name in self._rows else tensor
                state[name] = known.detach().to("cpu", copy=True)
        if self._private is not None:
            bounds = settled_bounds(self._family, self._stage.pixels.max)
            export_hf(state, self._config, self._tokenizer.directory, self._folder, bounds, self._dtype)
        barrier(self._context)
        if self._loaded is not None:
            self._loaded.reload()
            return
        loading = Loading(
            self._folder, self._context.device, self._dtype, self._stage.sequence_length, self._stage.seed, self._memory_share, self._sleeps
        )
        self._loaded = Vllm(loading, self._family, self._config, self._tokens)

    usage = None  # not known

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady | None = None) -> list[list[Response]]:
        assert self._loaded is not None, "update_weights comes first"
        return self._loaded.generate(prompts, sampling, ready)

    def sleep(self) -> None:
        """Give the GPU's memory back for the policy step."""
        if self._loaded is not None:
            self._loaded.sleep()

    def wake(self) -> None:
        """`update_weights` wakes the engine."""

    def close(self) -> None:
        """End the engine, and remove the directory that it read."""
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None
        if self._private is not None:
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


def first_rows(config: Any) -> dict[str, int]:
    """How many rows each parameter of the model of `config` has: fewer in embedding and head where its vocabulary is cut."""
    return {name: parameter.shape[0] for name, parameter in meta_model(config).named_parameters() if parameter.dim()}
