"""Adapters in a real vLLM: the export with them merged, and the base with them beside it, say what the native engine says."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from vllm_world import VOCABULARY, heads_of_32

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.data.prompt import read_prompt
from terrace.evaluate.engine import Model, load_model
from terrace.generation.interface import Prompt, Sampling
from terrace.generation.tokens import stop_tokens
from terrace.generation.vllm_requests import request_of
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

pytestmark = pytest.mark.vllm
TOKENS = 16
SHAPES = ([(90, 60)], [], [(60, 120), (100, 100)])


@pytest.fixture(scope="module")
def final(tmp_path_factory) -> Path:
    """The export of a stage in which adapters of every language layer train beside the whole projector."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lora")
    rows = []
    for number in range(12):
        (folder / f"{number}.png").write_bytes(families.picture(60 + 5 * number, 90, number))
        rows.append({"image": f"{number}.png", "caption": f"A picture in {('red', 'green', 'blue')[number % 3]}, number {number}."})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = heads_of_32("qwen2_5_vl")
    config["text_config"].pop("vocab_size")
    config["text_config"]["initializer_range"] = 0.3  # large enough that it says different things
    adapted = {"lr": 5e-2, "lora": {"rank": 4, "alpha": 8}}
    recipe = Recipe.model_validate({
        "name": "adapted", "model": {"architecture": "qwen2_5_vl", "config": config}, "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"captions": {"uri": str(folder / "captions.jsonl"), "kind": "caption"}}},
        "stages": [{
            "name": "adapt", "train": {"projector": {"lr": 1e-3}, "language": adapted}, "mixture": {"weights": {"captions": 1.0}},
            "budget": {"steps": 4}, "sequence_length": 512, "pixels": {"min": 784, "max": 12_544}, "batch": {"packs": 2},
            "precision": "fp32", "schedule": {"kind": "constant", "warmup": 0}, "data_loading": {"engine": "inline", "window_samples": 12},
        }],
    })  # fmt: skip
    prepare_data(recipe, folder / "run", use_ray=False)
    run_stage(recipe, 0, folder / "run", 1, WorkerContext())
    return folder / "run" / "stages" / "01-adapt" / "final"


def prompts_of(model: Model) -> list[Prompt]:
    found = []
    for number, sizes in enumerate(SHAPES):
        loaded = families.conversation(number, sizes)
        read = read_prompt(loaded.sample, loaded.images, loaded.sizes, model.tokenizer, model.sight.family, model.sight.pixels)
        found.append(Prompt(**vars(read.inputs), key=("s", number), id=str(number)))
    return found


def said(model: Model, prompts: list[Prompt]) -> list[list[int]]:
    return [group[0].tokens.tolist() for group in model.engine.generate(prompts, Sampling(1, TOKENS, temperature=0.0))]


def test_merged_and_unmerged_exports_answer_alike(final, in_this_process):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    merged, base = load_model(final, "cpu"), load_model(final / "adapter" / "base", "cpu")
    prompts = prompts_of(merged)
    expected, without = said(merged, prompts), said(base, prompts)
    assert expected != without, "adapters that change nothing show nothing"
    whole = load_model(final, "cpu", engine="vllm")
    assert said(whole, prompts) == expected
    whole.engine.close()

    config, tokenizer = merged.network.config, merged.tokenizer
    assert config.text_config.vocab_size < VOCABULARY
    never = dict.fromkeys(merged.engine._forbidden.tolist(), -100.0)
    ends = list(stop_tokens(tokenizer, config))
    how = SamplingParams(max_tokens=TOKENS, temperature=0.0, stop_token_ids=ends, logit_bias=never, detokenize=False)
    llm = LLM(
        model=str(final / "adapter" / "base"), enable_lora=True, max_lora_rank=8, dtype="float32", max_model_len=512,
        generation_config="vllm", kv_cache_memory_bytes=2**28, limit_mm_per_prompt={"image": 2, "video": 0},
    )  # fmt: skip
    requests = [request_of(prompt, merged.sight.family, config.image_token_id) for prompt in prompts]
    adapter = LoRARequest("adapter", 1, str(final / "adapter"))
    answers = [
        [list(output.outputs[0].token_ids) for output in llm.generate(requests, how, use_tqdm=False, lora_request=asked)]
        for asked in (adapter, None)
    ]
    assert answers == [expected, without]
