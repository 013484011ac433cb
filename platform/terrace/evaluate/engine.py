"""A model directory that answers: batched greedy decoding with a rollout engine, and the loss of a pack.

Any Hugging Face directory of a supported architecture will do: a stage's `final`, or a published model. A batch of
prompts is prefilled as one pack and decoded together; which cases share a batch depends on the suite alone, so the
answers are the same on one worker and on several.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from terrace.data.family import directory_family
from terrace.data.prompt import read_prompt
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.data.types import PackedExample
from terrace.errors import InputError, TerraceError
from terrace.evaluate.cases import Case
from terrace.evaluate.model_files import model_sight
from terrace.evaluate.replies import Reply, Settings
from terrace.families.interface import Sight
from terrace.generation.drafting import DraftingEngine
from terrace.generation.interface import Prompt, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.generation.vllm_directory import DirectoryEngine
from terrace.models.attention import choose_backend
from terrace.models.batch import to_device
from terrace.models.build import directory_config, materialise, meta_model
from terrace.models.families.registry import output_layer
from terrace.models.forward import pack_hidden
from terrace.models.heads import FOLDER, describe_heads, load_with_heads
from terrace.models.precision import DTYPES, compute_context
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.models.weights import initial_weights
from terrace.recipe.schema import Model as ModelSection

READ_THREADS = 4
LOSS_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Model:
    """A loaded model with everything that turns cases into answers."""

    directory: Path
    network: Any  # the transformers class; None where vLLM holds the weights
    tokenizer: TextTokenizer
    sight: Sight
    engine: NativeEngine | DirectoryEngine
    device: str
    precision: str

    def reply(
        self, cases: Sequence[Case], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> list[Reply]:
        """Answers of one batch, in order; greedy ones unless a temperature says otherwise."""
        with ThreadPoolExecutor(READ_THREADS) as pool:
            prompts = list(pool.map(lambda case: make_prompt(case, self.tokenizer, self.sight), cases))
        groups = self.engine.generate(prompts, Sampling(1, max_new_tokens, temperature, top_p, seed))
        replies = []
        for [response] in groups:
            tokens = response.tokens[:-1] if response.finished else response.tokens
            text = self.tokenizer.decode(tokens.tolist()).strip()
            replies.append(Reply(text, len(response.tokens), response.finished))
        return replies

    def loss(self, example: PackedExample) -> float:
        """Summed loss over the supervised tokens of a pack."""
        with torch.no_grad(), compute_context(self.precision, self.device):
            batch = to_device(example, torch.device(self.device), DTYPES[self.precision])
            hidden = pack_hidden(self.network, batch).index_select(0, batch.supervised_rows)
            return float(output_layer(self.network)(hidden, batch.targets, LOSS_CHUNK_TOKENS))


def use_threads_of_worker(worker: int, settings: Settings) -> str | None:
    """The device of a worker: GPUs in turn. On a CPU the workers share the cores."""
    if torch.cuda.is_available() and settings.device in (None, "cuda"):
        return f"cuda:{worker % torch.cuda.device_count()}"
    if settings.workers > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // settings.workers))
    return settings.device


def load_model(
    directory: Path,
    device: str | None = None,
    precision: str | None = None,
    batch_size: int = 16,
    pixels: tuple[int, int] | None = None,
    engine: str = "native",
) -> Model:
    """Load onto `device` (default: a GPU where there is one) in `precision` (default: bf16 on a GPU, else fp32).

    With `engine` vllm the model answers, but tells no losses.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bf16" if device.startswith("cuda") else "fp32")
    sight = Sight(directory_family(directory), pixels) if pixels else model_sight(directory)
    tokenizer = load_tokenizer(directory)
    sight = Sight(tokenizer.fit(sight.family), sight.pixels)
    config = directory_config(directory)
    if config.image_token_id != tokenizer.marks(sight.family)["image"]:
        raise InputError(f"{directory}: config.json and tokenizer.json disagree on the image token")
    if engine == "vllm":
        loaded = DirectoryEngine(directory, config, tokenizer, sight, device, precision)
        return Model(directory, None, tokenizer, sight, loaded, device, precision)
    section = ModelSection(architecture=config.model_type, pretrained=str(directory))
    skeleton = meta_model(config)
    source, _ = initial_weights(section, skeleton, directory)
    network = materialise(skeleton, source, device, DTYPES[precision])
    drafts = describe_heads(directory / FOLDER) is not None
    if drafts:
        load_with_heads(network, directory / FOLDER)
    backend, _ = choose_backend("auto", torch.device(device).type, precision)
    use_shared_prompt_attention(network, backend)
    network.eval()
    native = (DraftingEngine if drafts else NativeEngine)(
        network, forbidden_tokens(tokenizer, config), stop_tokens(tokenizer, config), device, precision, max_rows=batch_size
    )
    return Model(directory, network, tokenizer, sight, native, device, precision)


def make_prompt(case: Case, tokenizer: TextTokenizer, sight: Sight) -> Prompt:
    """A case as the model reads it, through the template and the pixels of training."""
    try:
        read = read_prompt(case.prompt, case.read_images(), case.sizes, tokenizer, sight.family, sight.pixels)
    except TerraceError as error:
        raise InputError(f"case {case.id}: {error}") from error
    return Prompt(**vars(read.inputs), key=(case.id, case.rotation), id=case.id, text=case.text)
