"""Prompts, sampling and responses as the plain values that vLLM takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from terrace.data.order.permutation import seed_of
from terrace.errors import InputError, TerraceError
from terrace.families.interface import Family
from terrace.generation.interface import Prompt, Response, Sampling

MOST_IMAGES = 64  # of one prompt
BANNED = -100.0  # added to a logit: a probability of e-100; vLLM takes no less


def request_of(prompt: Prompt, family: Family, image_token: int) -> dict[str, Any]:
    """A prompt for vLLM: each image as one placeholder, and its picture. Raises InputError for more than vLLM is opened for."""
    if len(prompt.image_tokens) > MOST_IMAGES:
        raise InputError(
            f"prompt {prompt.id}: {len(prompt.image_tokens)} images; engine vllm is opened for {MOST_IMAGES} in a prompt, choose native"
        )
    if prompt.videos:
        raise InputError(f"prompt {prompt.id}: it shows a video; engine vllm is given images only, choose native")
    if len(prompt.image_tokens) and not family.whole_pictures:
        raise InputError(f"prompt {prompt.id}: {family.name} cuts tiles of its pictures, which cannot be given back whole; choose native")
    request: dict[str, Any] = {"prompt_token_ids": collapsed(prompt, image_token)}
    if pictures := pictures_of(prompt, family):
        request["multi_modal_data"] = {"image": pictures}
    return request


def collapsed(prompt: Prompt, image_token: int) -> list[int]:
    """The prompt's token ids with the placeholders of each image as one, which vLLM expands again."""
    ids = prompt.input_ids
    keep = np.ones(len(ids), bool)
    places = np.flatnonzero(ids == image_token)
    first = np.concatenate([[0], np.cumsum(prompt.image_tokens)[:-1]]) if len(prompt.image_tokens) else np.zeros(0)
    keep[places] = False
    keep[places[first.astype(np.int64)]] = True  # neighbours without a mark between them are images of their own
    return ids[keep].tolist()


def pictures_of(prompt: Prompt, family: Family) -> list[Any]:
    """The prompt's images as PIL pictures at the resolution that the model sees."""
    from PIL import Image

    ends = np.cumsum(prompt.image_rows)
    rows = [prompt.pixels[end - count : end] for end, count in zip(ends, prompt.image_rows)]
    return [Image.fromarray(family.pictures_of(part, facts)[0]) for part, facts in zip(rows, prompt.image_facts.tolist())]


def sampling_values(prompt: Prompt, sampling: Sampling, sample: int, forbidden: Sequence[int], stop: Sequence[int]) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams for one response: the same whatever else is in the batch."""
    return {
        "n": 1, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "seed": seed_of(sampling.seed, *prompt.draws_of(sample)) % 2**31, "logprobs": 0,
        "stop_token_ids": list(stop), "logit_bias": dict.fromkeys(forbidden, BANNED), "detokenize": False,
    }  # fmt: skip


def response_of(output: Any, sampling: Sampling) -> Response:
    """vLLM's completion. Below `top_p` 1 its log-probabilities are those within the nucleus, another distribution than the
    interface means: they are NaN here, and nothing is compared with them."""
    tokens = np.asarray(output.token_ids, np.int32)
    if sampling.top_p < 1 and sampling.temperature > 0:
        chosen = np.full(len(tokens), np.nan, np.float32)
    else:
        chosen = np.asarray([place[int(token)].logprob for place, token in zip(output.logprobs, tokens, strict=True)], np.float32)
    return Response(tokens, chosen, output.finish_reason == "stop")


def checked_prompt(prompt: Prompt, expanded: Sequence[int] | None) -> None:
    """Raise TerraceError where vLLM read another prompt than the trainer will."""
    own = prompt.input_ids.tolist()
    if list(expanded or ()) != own:
        raise TerraceError(
            f"prompt {prompt.id}: vllm expands its images to {len(expanded or ())} tokens in all, Terrace to {len(own)}; the two "
            "preprocess images differently: choose engine native"
        )
