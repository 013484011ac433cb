"""The vLLM engine's calls, against a stand-in for the vllm module that takes only what vLLM documents.

It shows what Terrace asks of vLLM and in which order; that vLLM answers as documented takes a GPU.
"""

from __future__ import annotations

import importlib.machinery
import io
import sys
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from terrace.errors import InputError
from terrace.generation import vllm as adapter
from terrace.generation.interface import Prompt, Sampling
from terrace.recipe.schema import Stage
from terrace.worker.context import WorkerContext

PAD, START, END, STOP = 90, 91, 92, 7
CALLS: list[tuple[str, Any]] = []


class SamplingParams:
    def __init__(
        self, *, n: int, max_tokens: int, temperature: float, top_p: float, seed: int, logprobs: int, stop_token_ids: list[int],
        logit_bias: dict[int, float], detokenize: bool,
    ) -> None:  # fmt: skip
        self.__dict__.update({key: value for key, value in locals().items() if key != "self"})


class LLM:
    def __init__(
        self, *, model: str, dtype: str, enable_sleep_mode: bool, gpu_memory_utilization: float, max_model_len: int,
        mm_processor_kwargs: dict[str, int], logprobs_mode: str, limit_mm_per_prompt: dict[str, int], seed: int, generation_config: str,
    ) -> None:  # fmt: skip
        CALLS.append(("open", {key: value for key, value in locals().items() if key != "self"}))

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        CALLS.append(("generate", list(zip(prompts, sampling_params))))
        return [self._answer(number) for number in range(len(prompts))]

    def _answer(self, number: int) -> Any:
        """Request n samples the token n: half of them stop, the others reach the limit."""
        ended = number % 2 == 0
        tokens = [number, STOP] if ended else [number, number, number]
        logprobs = [{token: SimpleNamespace(logprob=-0.5 * place - 1, rank=2)} for place, token in enumerate(tokens)]
        output = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="stop" if ended else "length")
        return SimpleNamespace(outputs=[output])

    def sleep(self, level: int) -> None:
        CALLS.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        CALLS.append(("wake_up", tags))

    def collective_rpc(self, method: str) -> None:
        CALLS.append(("collective_rpc", method))

    def reset_prefix_cache(self) -> bool:
        CALLS.append(("reset_prefix_cache", None))
        return True


@pytest.fixture
def engine_of(monkeypatch, tmp_path):
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(adapter, "export_hf", lambda state, *rest: CALLS.append(("export", (sorted(state), rest))))
    CALLS.clear()
    stage = Stage.model_validate({
        "name": "morl", "objective": "grpo", "train": {"language": {"lr": 1e-3}}, "mixture": {"weights": {"a": 1.0}},
        "budget": {"steps": 1}, "sequence_length": 512, "pixels": {"min": 784, "max": 6272}, "precision": "bf16", "seed": 5,
    })  # fmt: skip
    tokenizer = SimpleNamespace(directory=tmp_path, special=SimpleNamespace(image_pad=PAD))

    def engine(device: str = "cuda:0", alone: bool = False, local_rank: int = 0):
        context = WorkerContext(rank=local_rank, local_rank=local_rank, device=device)
        config = SimpleNamespace(image_token_id=PAD)
        return adapter.VllmEngine(stage, config, tokenizer, (PAD, START, END), (STOP,), tmp_path, context, alone)

    return engine


def weights():
    import torch

    return iter([("a", torch.zeros(2)), ("b", torch.ones(1))])


def prompt(number: int, ids: list[int], colours: tuple[int, ...] = ()) -> Prompt:
    images = []
    for colour in colours:
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20), (colour, 0, 0)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    nothing = np.zeros((0, 3), np.int32)
    array = np.asarray(ids, np.int32)
    return Prompt(array, nothing, nothing, nothing, nothing, nothing, ("prompts", number), str(number), "task", images=tuple(images))


PROMPTS = [prompt(0, [1, START, PAD, PAD, PAD, END, START, PAD, END, 2], (10, 200)), prompt(1, [3, 4])]
SAMPLING = Sampling(samples=3, max_tokens=3, temperature=0.7, top_p=0.9, seed=11)


def test_weights_go_through_a_folder_and_the_engine_sleeps_during_the_update(engine_of):
    engine = engine_of()
    engine.sleep()
    assert CALLS == [], "there is nothing to put to sleep before the first weights"
    engine.update_weights(weights)
    (_, (names, _)), (_, options) = CALLS
    assert names == ["a", "b"]
    assert options["logprobs_mode"] == "processed_logprobs", "of the tempered distribution without banned tokens"
    assert (options["dtype"], options["max_model_len"], options["generation_config"]) == ("bfloat16", 512, "vllm")
    assert options["mm_processor_kwargs"] == {"min_pixels": 784, "max_pixels": 6272}
    assert options["enable_sleep_mode"]
    CALLS.clear()
    engine.sleep()
    engine.update_weights(weights)
    engine.wake()
    order = [(name, value) for name, value in CALLS if name != "export"]
    assert order == [
        ("sleep", 2), ("wake_up", ["weights"]), ("collective_rpc", "reload_weights"), ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache", None),
    ]  # fmt: skip
    assert CALLS[1][0] == "export", "the new folder lies there before vLLM reads it"


def test_a_rollout_worker_of_its_own_never_sleeps(engine_of):
    engine = engine_of(alone=True)
    for _ in range(2):
        engine.update_weights(weights)
        engine.sleep()
    names = [name for name, _ in CALLS]
    assert names == ["export", "open", "export", "collective_rpc", "reset_prefix_cache"]
    assert not CALLS[1][1]["enable_sleep_mode"]
    assert CALLS[1][1]["gpu_memory_utilization"] > 0.8


def test_one_worker_of_a_machine_writes_the_weights(engine_of):
    second = engine_of(local_rank=1)
    second.update_weights(weights)
    assert [name for name, _ in CALLS] == ["open"]
    first = engine_of()
    first.update_weights(weights)
    assert CALLS[0][1]["model"] == CALLS[-1][1]["model"]


def test_prompts_are_un_expanded_and_every_sample_has_its_own_seed(engine_of):
    engine = engine_of()
    engine.update_weights(weights)
    arrived = []
    groups = engine.generate(PROMPTS, SAMPLING, lambda place, group: arrived.append((place, len(group))))
    requests = CALLS[-1][1]
    assert [request["prompt_token_ids"] for request, _ in requests[::3]] == [[1, START, PAD, END, START, PAD, END, 2], [3, 4]]
    images = requests[0][0]["multi_modal_data"]["image"]
    assert [image.getpixel((0, 0)) for image in images] == [(10, 0, 0), (200, 0, 0)]
    assert "multi_modal_data" not in requests[3][0]
    seeds = [parameters.seed for _, parameters in requests]
    assert len(set(seeds)) == 6
    for _, parameters in requests:
        assert (parameters.n, parameters.max_tokens, parameters.temperature, parameters.top_p) == (1, 3, 0.7, 0.9)
        assert parameters.logit_bias == {PAD: -100.0, START: -100.0, END: -100.0}
        assert parameters.stop_token_ids == [STOP]
    assert arrived == [(0, 3), (1, 3)]
    assert [response.tokens.tolist() for response in groups[1]] == [[3, 3, 3], [4, STOP], [5, 5, 5]]
    assert [response.finished for response in groups[1]] == [False, True, False]
    assert groups[1][0].logprobs.tolist() == [-1.0, -1.5, -2.0]
    engine.generate(PROMPTS[1:], SAMPLING)
    assert [parameters.seed for _, parameters in CALLS[-1][1]] == seeds[3:], "whatever else is in the batch"


def test_without_a_gpu_it_is_refused(engine_of):
    with pytest.raises(InputError, match="CUDA"):
        engine_of(device="cpu")
