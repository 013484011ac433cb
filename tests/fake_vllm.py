"""A stand-in for the vllm module: it takes only what vLLM 0.32 documents, and keeps the state whose neglect makes the real one fail.

It expands placeholders from the pictures' sizes, has a prefix cache and, as vLLM, two encoder caches: the scheduler's, which
decides whether the tower runs, and the worker's, which has its output. `reload_weights` empties the worker's alone. A directory without
weights is read with `load_format: dummy`, which fills what no checkpoint brings with random numbers too, or by a loader that
the file of `worker_extension_cls` registers; that class's methods are the worker's.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

STOP = 7
UNIT = 28  # pixels of a token's side
ARGUMENTS = {
    "model", "dtype", "enable_sleep_mode", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_model_len", "logprobs_mode",
    "limit_mm_per_prompt", "seed", "generation_config", "load_format", "worker_extension_cls",
}  # fmt: skip
PARAMETERS = {"n", "max_tokens", "temperature", "top_p", "seed", "logprobs", "stop_token_ids", "logit_bias", "detokenize"}


class EngineDeadError(RuntimeError):
    pass


@dataclass
class Seen:
    """What was asked of vLLM, in order."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    pad: int = 90
    device_type: str = "cuda"
    answered_together: int = 2  # requests that end in one step
    dies_at_step: int | None = None
    expands_by: int = 0  # tokens too many for each image
    alive: int = 0
    weights: dict[str, Any] = field(default_factory=dict)  # what the worker loaded last
    loaders: dict[str, type] = field(default_factory=dict)  # by load format

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


class SamplingParams:
    def __init__(self, **values: Any) -> None:
        assert set(values) == PARAMETERS, set(values) ^ PARAMETERS
        if len(values["logit_bias"]) > 1024:
            raise ValueError("Too many logit bias tokens")
        self.__dict__.update(values)


class FakeEngine:
    """vLLM's LLMEngine with its scheduler and its worker."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.steps = seen, 0
        self.waiting: dict[str, tuple[str, dict, SamplingParams]] = {}  # internal name -> external name, prompt, parameters
        self.scheduler_images: set[bytes] = set()
        self.worker_images: set[bytes] = set()
        self.engine_core = SimpleNamespace(shutdown=self._shutdown)
        seen.alive += 1

    def _shutdown(self) -> None:
        self.seen.alive -= 1
        self.seen.calls.append(("shutdown", None))

    def reset_encoder_cache(self) -> None:
        self.seen.calls.append(("reset_encoder_cache", None))
        self.scheduler_images.clear()
        self.worker_images.clear()

    def abort_request(self, names: list[str], internal: bool = False) -> None:
        self.seen.calls.append(("abort_request", names))
        assert internal, "internal names"
        for name in names:
            self.waiting.pop(name, None)

    def step(self) -> list[Any]:
        """The last requests end first, a few in each step; the others say so too, unfinished."""
        self.steps += 1
        if self.seen.dies_at_step == self.steps:
            raise EngineDeadError("EngineCore encountered an issue")
        outputs = [SimpleNamespace(request_id="unheard of", finished=False)]
        for internal in list(self.waiting)[::-1][: self.seen.answered_together]:
            name, prompt, parameters = self.waiting.pop(internal)
            outputs.append(self._answer(name, prompt, parameters))
        for name, _, _ in self.waiting.values():  # begun: one token so far, as vLLM tells it, all tokens each time
            begun = SimpleNamespace(token_ids=[int(name) % 50], finish_reason=None)
            outputs.append(SimpleNamespace(request_id=name, finished=False, outputs=[begun]))
        return outputs

    def _answer(self, name: str, prompt: dict, parameters: SamplingParams) -> Any:
        """Request n samples the token n: half of them stop, the others reach the limit."""
        number = int(name)
        tokens = [number % 50, STOP] if number % 2 == 0 else [number % 50] * parameters.max_tokens
        logprobs = [{token: SimpleNamespace(logprob=-0.5 * place - 1, rank=2)} for place, token in enumerate(tokens)]
        output = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="stop" if number % 2 == 0 else "length")
        return SimpleNamespace(request_id=name, finished=True, outputs=[output], prompt_token_ids=self._expanded(prompt))

    def _expanded(self, prompt: dict) -> list[int]:
        pictures = iter(prompt.get("multi_modal_data", {}).get("image", []))
        ids = []
        for token in prompt["prompt_token_ids"]:
            if token != self.seen.pad:
                ids.append(token)
                continue
            picture = next(pictures)
            self._encode(picture.tobytes())
            assert (picture.width % UNIT, picture.height % UNIT) == (0, 0), "vLLM would resize it once more"
            ids += [token] * (picture.width * picture.height // UNIT**2 + self.seen.expands_by)
        assert next(pictures, None) is None, "a picture without a placeholder"
        return ids

    def _encode(self, image: bytes) -> None:
        if image not in self.scheduler_images:
            self.scheduler_images.add(image)
            self.worker_images.add(image)
        elif image not in self.worker_images:
            raise RuntimeError("Encoder cache miss for an image")


def worker_of(extension: str, seen: Seen) -> Any:
    """vLLM's worker, with the methods of a class that is given by name; one that has a method of the worker's is refused."""

    class Worker:
        def reload_weights(self, weights_iterator: Any = None, weights_path: str | None = None, is_checkpoint_format: bool = True) -> None:
            seen.weights = dict(weights_iterator)

    module, _, name = extension.rpartition(".")
    mixed = getattr(importlib.import_module(module), name) if extension else object
    assert not any(hasattr(Worker, one) for one in vars(mixed) if not one.startswith("__"))
    return type("Extended", (Worker, mixed) if extension else (Worker,), {})()


class Model(torch.nn.Module):
    """A weight that a checkpoint has, and the pictures' mean, which none has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2,), torch.nan))
        self.register_buffer("mean", torch.full((2,), 0.5))


def loaded(arguments: dict[str, Any], seen: Seen) -> Model:
    """The model as vLLM's loaders leave it."""
    model, form = Model(), arguments.get("load_format", "auto")
    if form in seen.loaders:
        seen.loaders[form]().load_weights(model, None)
    elif form == "dummy":
        for tensor in model.state_dict().values():
            tensor.uniform_(-1e-3, 1e-3)
    else:
        assert form == "auto", f"Load format {form} is not supported"
        assert list(Path(arguments["model"]).glob("*.safetensors")), "Cannot find any model weights"
        model.weight.data.zero_()
    return model


def llm_class(seen: Seen) -> type:
    class LLM:
        def __init__(self, **arguments: Any) -> None:
            assert set(arguments) <= ARGUMENTS, set(arguments) - ARGUMENTS
            if arguments["enable_sleep_mode"] and seen.device_type == "cpu":
                raise ValueError("Sleep mode is not supported on current platform.")
            self._worker = worker_of(arguments.get("worker_extension_cls", ""), seen)
            model = loaded(arguments, seen)
            assert bool((model.mean == 0.5).all()), "pictures are normalised by random numbers"
            assert not bool(model.weight.isnan().any()), "vLLM runs the model when it is opened"
            seen.calls.append(("open", {**arguments, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}))
            self._sleep_mode, self._asleep = arguments["enable_sleep_mode"], set()
            self._counter = 0
            self.llm_engine = FakeEngine(seen)

        def enqueue(self, prompts: list[dict], sampling_params: list[SamplingParams], *, use_tqdm: bool = True) -> list[str]:
            assert not self._asleep, f"asleep: {self._asleep}"
            seen.calls.append(("generate", list(zip(prompts, sampling_params, strict=True))))
            names = []
            for prompt, parameters in zip(prompts, sampling_params):
                internal = f"{self._counter}-{'%08x' % (self._counter * 7919)}"
                self.llm_engine.waiting[internal] = (str(self._counter), prompt, parameters)
                names.append(internal)
                self._counter += 1
            return names

        def sleep(self, level: int) -> None:
            seen.calls.append(("sleep", level))
            assert self._sleep_mode, "sleep mode is off"
            self._asleep = {"weights", "kv_cache"}
            self.llm_engine.scheduler_images.clear()
            self.llm_engine.worker_images.clear()

        def wake_up(self, tags: list[str]) -> None:
            seen.calls.append(("wake_up", tags))
            self._asleep -= set(tags)

        def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None) -> list[Any]:
            seen.calls.append(("collective_rpc", method))
            assert "weights" not in self._asleep
            answer = getattr(self._worker, method)(*args, **(kwargs or {}))
            self.llm_engine.worker_images.clear()
            return [answer]

        def reset_prefix_cache(self) -> bool:
            seen.calls.append(("reset_prefix_cache", None))
            return True

    return LLM


def install(monkeypatch: Any) -> Seen:
    """Put the stand-in in vllm's place for one test."""
    seen = Seen()
    loader = "vllm.model_executor.model_loader"
    names = (
        "vllm", "vllm.platforms", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.exceptions", "vllm.model_executor", loader,
        f"{loader}.base_loader",
    )  # fmt: skip
    modules = {name: types.ModuleType(name) for name in names}
    modules["vllm"].__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    modules["vllm"].LLM, modules["vllm"].SamplingParams = llm_class(seen), SamplingParams
    type_of = type("Platform", (), {"device_type": property(lambda _: seen.device_type)})
    modules["vllm.platforms"].current_platform = type_of()
    modules["vllm.v1.engine.exceptions"].EngineDeadError = EngineDeadError
    modules[loader].register_model_loader = lambda form: lambda kind: seen.loaders.setdefault(form, kind)
    modules[f"{loader}.base_loader"].BaseModelLoader = type("BaseModelLoader", (), {})
    monkeypatch.delitem(sys.modules, "terrace.generation.vllm_worker", raising=False)  # it registers when it is imported
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen
