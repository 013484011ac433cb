"""The vLLM rollout engine, the only file that imports vllm. For GPUs; not exercised by the tests, which have none.

vLLM loads the policy as a Hugging Face directory, sleeps at level 2 (weights and cache dropped) during the policy step,
and reloads the directory after it. Images go in as files under an un-expanded placeholder: vLLM expands and resizes
them itself, with the stage's pixel bounds, so its preprocessing is the reference's and not Terrace's; the mismatch
between its log-probabilities and the trainer's is a metric of every iteration and has an alarm.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.order import seed_of
from terrace.data.tokenizer import TextTokenizer
from terrace.errors import InputError
from terrace.models.export import export_hf
from terrace.recipe.schema import Stage
from terrace.rl.rollout import GroupReady, Prompt, Response, Sampling
from terrace.train.context import WorkerContext
from terrace.train.finish import EXPORT_DTYPES

GPU_MEMORY_SHARE = 0.5  # the rest stays with the training engine


def require_vllm() -> None:
    """Raise InputError where vllm is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("grpo.engine: vllm is not installed (pip install vllm, CUDA only), or choose engine: native")


class VllmEngine:
    """See rollout.RolloutEngine. One engine per rank (tensor parallel 1), beside the training model on the same GPU."""

    def __init__(
        self,
        stage: Stage,
        config: Any,
        tokenizer: TextTokenizer,
        forbidden: Sequence[int],
        stop: Sequence[int],
        stage_dir: Path,
        context: WorkerContext,
    ) -> None:
        require_vllm()
        if not context.device.startswith("cuda"):
            raise InputError(f"grpo.engine: vllm needs a CUDA device, this worker has {context.device}; choose native")
        self._stage, self._config, self._tokenizer = stage, config, tokenizer
        self._forbidden, self._stop = list(forbidden), list(stop)
        self._folder = stage_dir / "rollout-weights" / f"rank-{context.rank}"
        self._engine: Any = None

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        """Write the policy as a Hugging Face directory and let vLLM read it (again)."""
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors()}
        pixels = (self._stage.pixels.min, self._stage.pixels.max)
        dtype = EXPORT_DTYPES[self._stage.precision]
        export_hf(state, self._config, self._tokenizer.directory, self._folder, pixels, dtype)
        if self._engine is None:
            self._engine = self._open(dtype)
            return
        self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("reload_weights")
        self._engine.wake_up(tags=["kv_cache"])
        self._engine.reset_prefix_cache()

    def _open(self, dtype: str) -> Any:
        from vllm import LLM

        pixels = {"min_pixels": self._stage.pixels.min, "max_pixels": self._stage.pixels.max}
        return LLM(
            model=str(self._folder), dtype=dtype, enable_sleep_mode=True, gpu_memory_utilization=GPU_MEMORY_SHARE,
            max_model_len=self._stage.sequence_length, mm_processor_kwargs=pixels, logprobs_mode="processed_logprobs",
            limit_mm_per_prompt={"image": 64}, seed=self._stage.seed,
        )  # fmt: skip

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady | None = None
    ) -> list[list[Response]]:
        """One request per sample, each with its own seed from (seed, prompt, sample)."""
        from PIL import Image
        from vllm import SamplingParams

        banned = {str(token): -100.0 for token in self._forbidden}
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
                    stop_token_ids=self._stop, logit_bias={int(token): bias for token, bias in banned.items()},
                    detokenize=False,
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
        pad = self._tokenizer.special.image_pad
        keep = np.ones(len(ids), bool)
        keep[1:] = ~((ids[1:] == pad) & (ids[:-1] == pad))
        return ids[keep].tolist()

    def sleep(self) -> None:
        """Give the GPU's memory back for the policy step."""
        if self._engine is not None:
            self._engine.sleep(level=2)

    def wake(self) -> None:
        """`update_weights` wakes the engine."""


def _response(output: Any) -> Response:
    tokens = np.asarray(output.token_ids, np.int32)
    chosen = [place[int(token)].logprob for place, token in zip(output.logprobs, tokens)]
    return Response(tokens, np.asarray(chosen, np.float32), output.finish_reason == "stop")
