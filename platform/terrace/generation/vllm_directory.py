"""A model directory in vLLM as it lies there: what evaluation asks. Nothing of it is copied but its small files' names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terrace.data.tokenizer import TextTokenizer
from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.families.interface import Sight
from terrace.generation.interface import GroupReady, Heard, Prompt, Response, Sampling
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.generation.vllm import Loading, Tokens, Vllm, require_vllm
from terrace.generation.vllm_folder import PrivateFolder, settled_bounds, with_bounds
from terrace.models.precision import DTYPE_NAMES

LONGEST = 16_384  # tokens of a prompt with its answer, or what the model's positions allow


class DirectoryEngine:
    """The `generate` and `close` of interface.RolloutEngine. Raises InputError where vllm is missing or of another device."""

    def __init__(self, model: Path, config: Any, tokenizer: TextTokenizer, sight: Sight, device: str, precision: str) -> None:
        require_vllm(device, "--engine")
        self.longest = min(LONGEST, language_config(config).max_position_embeddings)
        self._private = PrivateFolder()
        try:
            bounds = settled_bounds(sight.family, sight.pixels[1])
            folder = with_bounds(model, sight.family, bounds, self._private.path / "model")
            tokens = Tokens(config.image_token_id, forbidden_tokens(tokenizer, config), stop_tokens(tokenizer, config))
            self._loaded = Vllm(Loading(folder, device, DTYPE_NAMES[precision], self.longest), sight.family, config, tokens)
        except BaseException:
            self._private.close()
            raise

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady | None = None, heard: Heard | None = None
    ) -> list[list[Response]]:
        for prompt in prompts:
            if len(prompt.input_ids) + sampling.max_tokens > self.longest:
                raise InputError(
                    f"case {prompt.id}: {len(prompt.input_ids)} tokens and an answer of up to {sampling.max_tokens} are more than "
                    f"engine vllm is opened for ({self.longest}); use --engine native, or smaller --pixels"
                )
        return self._loaded.generate(prompts, sampling, ready, heard)

    def close(self) -> None:
        """End the engine and its process."""
        self._loaded.close()
        self._private.close()
