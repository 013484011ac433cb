"""The interface of rollout engines: prompts in as token ids, G responses each out with token ids and log-probabilities.

Two engines stand behind it: `native` (decoding on the training model itself) and `vllm`. Both receive the same prompts
from the same preprocessing, never sample a media token, and report the log-probability of every sampled token under the
tempered distribution without those tokens, which is the distribution that the policy step differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from terrace.data.order.permutation import seed_of
from terrace.data.types import PromptInputs
from terrace.generation.usage import Usage


@dataclass(frozen=True)
class Prompt(PromptInputs):
    """One prompt as the model reads it: its inputs, whose tokens end with the header of an answer, and what it is about."""

    key: tuple[str, int] = ("", -1)  # (source, row)
    id: str = ""
    task: str = ""
    text: str = ""  # for rewards and logs, images as a placeholder
    solution: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()  # encoded files, for engines that do their own vision preprocessing
    occurrence: int = 0  # how often this prompt was drawn before in the same iteration
    turn: int = 0  # answers that its tokens hold already, of a conversation with an environment (`generation.turns`)
    sample: int = 0  # the number of the first response to it, where the group's prompts differ by then

    @property
    def reward_metadata(self) -> dict[str, Any]:
        """What rewards may know beside the text: the metadata, and the image files for those that look at them."""
        return {**self.metadata, "images": self.images} if self.images else self.metadata

    def draws_of(self, sample: int) -> tuple[Any, ...]:
        """What the random numbers of a response depend on beside the seed."""
        return (*self.key, self.occurrence, self.sample + sample, *([self.turn] if self.turn else []))


@dataclass(frozen=True)
class Sampling:
    """How to sample. `seed` is that of the iteration; temperature 0 is greedy."""

    samples: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        """What logits are divided by where log-probabilities are formed."""
        return self.temperature if self.temperature > 0 else 1.0


@dataclass(frozen=True)
class Observed:
    """What a response of several turns has beside its T tokens, which hold the environment's observations too."""

    sampled: np.ndarray  # bool [T]: the policy's own tokens; no other one is ever trained
    inputs: PromptInputs  # of the T tokens: positions behind the prompt's, and the pixels of the observations
    value: float | None = None  # what the environment paid for the conversation; None: see `failure`
    failure: str | None = None  # why there is no value; None beside a `value` of None: rules judge the last answer
    messages: tuple[dict[str, Any], ...] = ()  # behind the prompt, as data.types.Sample has them
    images: tuple[bytes, ...] = ()  # encoded files of the observations

    @property
    def turns(self) -> int:
        """Answers in it."""
        return sum(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Response:
    """One sampled response: tokens int32 [T] with the stop token if it came, log-probabilities float32 [T] under the
    distribution above; NaN where the engine knows only those of another one, and at tokens that it did not sample."""

    tokens: np.ndarray
    logprobs: np.ndarray
    finished: bool  # a stop token came; else it was cut at the length limit
    observed: Observed | None = None  # of a conversation with an environment; its last token is always a sampled one
    versions: np.ndarray | None = None  # int32 [T]: the number of the weights that sampled each token, where the engine tells

    @property
    def sampled_tokens(self) -> np.ndarray:
        """int32 [N]: what the policy said, which is all that trains."""
        return self.tokens if self.observed is None else self.tokens[self.observed.sampled]

    @property
    def sampled_logprobs(self) -> np.ndarray:
        """float32 [N]."""
        return self.logprobs if self.observed is None else self.logprobs[self.observed.sampled]

    @property
    def turns(self) -> int | None:
        """Answers of a conversation with an environment; None for any other response."""
        return None if self.observed is None else self.observed.turns

    @property
    def longest_answer(self) -> int:
        """Tokens of its longest answer: of one turn, where it has several."""
        if self.observed is None:
            return len(self.tokens)
        ends = np.flatnonzero(np.diff(np.concatenate([[0], self.observed.sampled.astype(np.int8), [0]])))
        return int((ends[1::2] - ends[::2]).max())

    @property
    def visual_tokens(self) -> int:
        """Placeholders of the images that observations showed."""
        return 0 if self.observed is None else int(self.observed.inputs.image_tokens.sum())


GroupReady = Callable[
    [int, list[Response]], None
]  # (place of the prompt, its responses), as soon as a group is complete


Heard = Callable[[int, int, Sequence[int]], None]  # (place of the prompt, sample, its next tokens); an error of it ends generation


class RolloutEngine(Protocol):
    @property
    def usage(self) -> Usage | None:
        """What it did since it was last asked, where it knows."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady | None = None
    ) -> list[list[Response]]:
        """G responses per prompt, in order. `ready` is called early, so that rewards overlap with decoding.

        Engines of `rollout: seamless` take an iterator as well, which they ask as they have room (None: not now), and `stop`, which
        ends generation with what is complete."""

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        """Take over the policy's weights; nothing to do where the engine runs on the training model. `version`: iterations that were
        trained before, which responses name. May be called while another thread generates, where `rollout: seamless` is offered."""

    def together(self) -> AbstractContextManager[None]:
        """Inside, ranks decode. Every rank enters, with prompts or without: an engine whose weights are in shards needs all of them."""

    def sleep(self) -> None:
        """Release memory for the policy step."""

    def wake(self) -> None:
        """Get ready to generate again."""

    def close(self) -> None:
        """End what the engine holds outside this process. It generates nothing afterwards."""


def uniforms(seed: int, prompt: Prompt, sample: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): the random numbers of one response, from (seed, prompt, sample) alone.

    Whatever else is in the batch, in which order and on how many workers: the same response draws the same numbers.
    """
    state = seed_of(seed, "response", *prompt.draws_of(sample))
    return np.random.Generator(np.random.Philox(key=state)).random(count)
