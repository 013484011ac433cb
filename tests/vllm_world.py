"""A tiny model that vLLM's CPU kernels take (heads of 32 values), prompts with pictures, and what they are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import psutil
import torch
from transformers import AutoModelForImageTextToText

from terrace.data.prompt import read_prompt
from terrace.data.tokenizer import train_tokenizer
from terrace.families.registry import make_family
from terrace.generation.interface import Prompt, Response, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.generation.vllm_policy import VllmEngine
from terrace.models.build import model_config
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.grpo import PolicyOptions, summed_policy_loss
from terrace.recipe.schema import Model, Stage
from terrace.rl.units import TrainGroup, policy_batch
from terrace.worker.context import WorkerContext

VOCABULARY = 1800  # of the model; its tokenizer has fewer, and the difference is more than vLLM takes as biases
SECTIONS = {"qwen2_vl": [4, 6, 6], "qwen2_5_vl": [4, 6, 6]}
SHAPES: Sequence[Sequence[tuple[int, int]]] = ([(90, 60)], [], [(60, 120), (100, 100), (200, 33)], [(300, 31)])


@dataclass(frozen=True)
class World:
    """A family's tiny model, its tokenizer and some prompts."""

    case: families.Case
    prompts: list[Prompt]
    never: tuple[int, ...]
    stop: tuple[int, ...]

    def model(self, seed: int) -> Any:
        """Weights of their own for each seed, large enough that it says different things."""
        model = families.model_of(self.case, deviation=0.1 + 0.05 * seed)
        use_shared_prompt_attention(model, "sdpa_segments")
        return model

    def native(self, model: Any) -> NativeEngine:
        return NativeEngine(model, self.never, self.stop, "cpu", "fp32")

    @contextmanager
    def vllm(self) -> Iterator[VllmEngine]:
        stage = Stage.model_validate({
            "name": "rl", "objective": "grpo", "train": {"language": {"lr": 1e-3}}, "mixture": {"weights": {"a": 1.0}},
            "budget": {"steps": 1}, "sequence_length": 512, "pixels": dict(zip(("min", "max"), self.case.pixels)), "precision": "fp32",
        })  # fmt: skip
        engine = VllmEngine(stage, self.case.config, self.case.tokenizer, self.never, self.stop, WorkerContext())
        try:
            yield engine
        finally:
            engine.close()


def heads_of_32(name: str, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    config = {**families.CONFIGS[name]}
    text = {**config["text_config"], "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": vocabulary}
    if name in SECTIONS:
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": SECTIONS[name]}
    return {**config, "text_config": text}


def world_of(name: str, folder: Path, vocabulary: int = VOCABULARY) -> World:
    config = heads_of_32(name, vocabulary)
    section = Model.model_validate({"architecture": name, "config": config})
    family = make_family(name, config)
    tokenizer = train_tokenizer(families.WORDS * 40, 400, folder / name, family)
    case = families.Case(
        name, section, family, tokenizer, model_config(section, tokenizer), families.PIXELS.get(name, (784, 12_544))
    )
    prompts = []
    for number, sizes in enumerate(SHAPES):
        loaded = families.conversation(number, sizes)
        read = read_prompt(loaded.sample, loaded.images, loaded.sizes, tokenizer, family, case.pixels)
        prompts.append(Prompt(**vars(read.inputs), key=("s", number), id=str(number)))
    return World(case, prompts, forbidden_tokens(tokenizer, case.config), stop_tokens(tokenizer, case.config))


def in_another_order(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(prompt) for prompt in reversed(prompts)]


def said(groups: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[response.tokens.tolist() for response in group] for group in groups]


def said_by_transformers(world: World, model: Any, tokens: int) -> list[list[list[int]]]:
    """Greedy answers of transformers' own class, one prompt at a time."""
    reference = AutoModelForImageTextToText.from_config(world.case.config, dtype=torch.float32, attn_implementation="sdpa").eval()
    reference.load_state_dict(model.state_dict())
    found = []
    for prompt in world.prompts:
        inputs = families.reference_inputs(world.case, prompt, reference)
        with torch.no_grad():
            out = reference.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, suppress_tokens=list(world.never), eos_token_id=list(world.stop),
                pad_token_id=world.stop[0],
            )  # fmt: skip
        found.append([out[0, inputs["input_ids"].shape[1] :].tolist()])
    return found


def mismatch(world: World, model: Any, groups: Sequence[Sequence[Response]], sampling: Sampling) -> float:
    """Largest |log-probability of the engine - of the trainer| over all tokens."""
    trained = [TrainGroup(prompt, tuple(group), (1.0,) * len(group)) for prompt, group in zip(world.prompts, groups)]
    batch = policy_batch(trained, "cpu", torch.float32)
    with torch.no_grad():
        options = PolicyOptions(temperature=sampling.scale, forbidden=world.never, chunk_tokens=256)
        summed_policy_loss(model, batch, options)
    engine = np.concatenate([response.logprobs for group in groups for response in group])
    return float(np.abs(batch.results["logprobs"].numpy() - engine).max())


def engine_processes(of: int | None = None) -> list[psutil.Process]:
    """Processes of vLLM's engine core below a process (this one)."""
    found = []
    for child in psutil.Process(of).children(recursive=True):
        try:
            if "EngineCore" in " ".join([child.name(), *child.cmdline()]):
                found.append(child)
        except psutil.Error:
            continue  # ended meanwhile
    return found


def private_folders() -> list[Path]:
    from terrace.generation.vllm_folder import PREFIX

    return list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
