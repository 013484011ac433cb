"""The vLLM rollout engine, the only file that imports vllm. For GPUs: the tests drive it with a stand-in for vllm alone.

vLLM loads the policy as a Hugging Face directory, sleeps at level 2 (weights and cache dropped) during the policy step,
and reloads the directory after it. The directory lies on the machine's own disk and is written once per machine. Images
go in as files under an un-expanded placeholder: vLLM expands and resizes them itself, with the stage's pixel bounds, so
its preprocessing is the reference's and not Terrace's; the mismatch between its log-probabilities and the trainer's is
a metric of every iteration and has an alarm. Rewards begin when all prompts of a call are decoded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.order.permutation import seed_of
from terrace.data.tokenizer import TextTokenizer
from terrace.errors import InputError
from terrace.generation.interface import GroupReady, Prompt, Response, Sampling
from terrace.models.export import export_hf
from terrace.models.precision import DTYPE_NAMES
from terrace.recipe.schema import Stage
from terrace.worker.collectives import barrier
from terrace.worker.context import WorkerContext

GPU_MEMORY_SHARE = 0.5  # the rest stays with the training engine
GPU_MEMORY_SHARE_ALONE = 0.9  # a rollout worker of its own
BANNED = -100.0  # added to a logit: a probability of e-100


def require_vllm() -> None:
    """Raise InputError where vllm is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("grpo.engine: vllm is not installed (pip install vllm, CUDA only), or choose engine: native")


class VllmEngine:
    """See rollout.RolloutEngine. One engine per rank (tensor parallel 1), beside the training model on the same GPU, or
    `alone` in a rollout worker."""

    def __init__(
        self,
        stage: Stage,
        config: Any,
        tokenizer: TextTokenizer,
        forbidden: Sequence[int],
        stop: Sequence[int],
        stage_dir: Path,
        context: WorkerContext,
        alone: bool = False,
    ) -> None:
        require_vllm()
        if not context.device.startswith("cuda"):
            raise InputError(f"grpo.engine: vllm needs a CUDA device, this worker has {context.device}; choose native")
        self._stage, self._config, self._tokenizer, self._context = stage, config, tokenizer, context
        self._forbidden, self._stop, self._alone = list(forbidden), list(stop), alone
        mark = hashlib.sha256(str(stage_dir.absolute()).encode()).hexdigest()[:12]
        own = f"worker-{context.rank}" if alone else "training"
        self._folder = Path(tempfile.gettempdir()) / f"terrace-rollout-weights-{mark}" / own
        self._engine: Any = None

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        """Write the policy as a Hugging Face directory, once per machine, and let vLLM read it (again)."""
        writes = self._context.local_rank == 0
        state = {}
        for name, tensor in tensors():  # collective where the parameters are sharded: every rank goes through
            if writes:
                state[name] = tensor.detach().to("cpu", copy=True)
        pixels = (self._stage.pixels.min, self._stage.pixels.max)
        dtype = DTYPE_NAMES[self._stage.precision]
        if writes:
            export_hf(state, self._config, self._tokenizer.directory, self._folder, pixels, dtype)
        barrier(self._context)
        if self._engine is None:
            self._engine = self._open(dtype)
            return
        if not self._alone:
            self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("reload_weights")
        if not self._alone:
            self._engine.wake_up(tags=["kv_cache"])
        self._engine.reset_prefix_cache()  # what it holds was computed with the weights before

    def _open(self, dtype: str) -> Any:
        from vllm import LLM

        pixels = {"min_pixels": self._stage.pixels.min, "max_pixels": self._stage.pixels.max}
        return LLM(
            model=str(self._folder), dtype=dtype, enable_sleep_mode=not self._alone,
            gpu_memory_utilization=GPU_MEMORY_SHARE_ALONE if self._alone else GPU_MEMORY_SHARE,
            max_model_len=self._stage.sequence_length, mm_processor_kwargs=pixels, logprobs_mode="processed_logprobs",
            limit_mm_per_prompt={"image": 64}, seed=self._stage.seed,
            generation_config="vllm",  # sampling is what the recipe says, not what a directory suggests
        )  # fmt: skip

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady | None = None
    ) -> list[list[Response]]:
        """One request per sample, each with its own seed from (seed, prompt, sample)."""
        from PIL import Image
        from vllm import SamplingParams

        banned = dict.fromkeys(self._forbidden, BANNED)
        requests, parameters = [], []
        for prompt in prompts:
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in prompt.images]
            request = {"prompt_token_ids": self._collapsed(prompt)}
            if images:
                request["multi_modal_data"] = {"image": images}
            for sample in range(sampling.samples):
                requests.append(request)
                parameters.append(SamplingParams(
                    n=1, max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                    seed=seed_of(sampling.seed, *prompt.key, prompt.occurrence, sample) % 2**31, logprobs=0,
                    stop_token_ids=self._stop, logit_bias=banned, detokenize=False,
                ))  # fmt: skip
        outputs = self._engine.generate(requests, parameters, use_tqdm=False)
        groups = []
        for place in range(len(prompts)):
            part = outputs[place * sampling.samples : (place + 1) * sampling.samples]
            groups.append([_response(output.outputs[0]) for output in part])
            if ready is not None:
                ready(place, groups[-1])
        return groups

    def _collapsed(self, prompt: Prompt) -> list[int]:
        """Token ids with each run of image tokens as one placeholder, which vLLM expands."""
        ids = prompt.input_ids
        pad = self._config.image_token_id
        keep = np.ones(len(ids), bool)
        keep[1:] = ~((ids[1:] == pad) & (ids[:-1] == pad))
        return ids[keep].tolist()

    def sleep(self) -> None:
        """Give the GPU's memory back for the policy step."""
        if self._engine is not None and not self._alone:
            self._engine.sleep(level=2)

    def wake(self) -> None:
        """`update_weights` wakes the engine."""

    def close(self) -> None:
        """Let the engine go, and the directory that it read."""
        self._engine = None
        if self._context.local_rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)


def _response(output: Any) -> Response:
    tokens = np.asarray(output.token_ids, np.int32)
    chosen = [place[int(token)].logprob for place, token in zip(output.logprobs, tokens)]
    return Response(tokens, np.asarray(chosen, np.float32), output.finish_reason == "stop")
