"""Conversations of several turns: the policy answers, something reacts (an environment), the policy reads it and answers again.

`converse` drives any engine through `generate`: each further answer is one to a prompt of its own, which holds the conversation so
far. An engine that keeps what it has computed (`native`, by `converse` of its own; vLLM, by its prefix cache) reads only what is new.
The random numbers of an answer depend on (seed, prompt, sample, turn) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from terrace.data.types import PromptInputs, following_positions, joined_pixels
from terrace.generation.interface import Observed, Prompt, Response, RolloutEngine, Sampling

# (place of the prompt, sample, its answer) -> what the policy reads next, up to the header of the next answer, with the positions that
# follow the answer; None: the conversation ends. Called as soon as an answer is there, once for each turn.
React = Callable[[int, int, Response], "Future[PromptInputs | None]"]


@dataclass
class Talk:
    """One conversation as it grows: `parts` are answers and what was read after each, in turn."""

    prompt: Prompt
    sample: int
    parts: list[PromptInputs] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)

    def answered(self, answer: Response) -> None:
        before = self.parts[-1] if self.parts else self.prompt
        positions = following_positions(before.positions, len(answer.tokens)).astype(np.int32)
        self.parts.append(PromptInputs(answer.tokens, positions, **_without_images(self.prompt)))
        self.answers.append(answer)

    def observed(self, observation: PromptInputs) -> None:
        self.parts.append(observation)

    @property
    def unread(self) -> PromptInputs:
        """What no forward pass has read yet behind an observation: the answer's last token, and the observation."""
        answer, observation = self.parts[-2:]
        tokens, positions = answer.input_ids[-1:], answer.positions[:, -1:]
        return replace(
            observation,
            input_ids=np.concatenate([tokens, observation.input_ids]), positions=np.concatenate([positions, observation.positions], 1),
        )  # fmt: skip

    def following(self) -> Prompt:
        """The prompt of the next answer: the whole conversation so far."""
        joined = _joined([self.prompt, *self.parts])
        own = {one.name: getattr(joined, one.name) for one in fields(PromptInputs)}
        return replace(self.prompt, **own, turn=len(self.answers), sample=self.sample)

    def response(self) -> Response:
        """The conversation behind the prompt as one response, whose observations are not the policy's."""
        answers, logprobs, sampled = iter(self.answers), [], []
        for number, part in enumerate(self.parts):
            own = number % 2 == 0
            sampled.append(np.full(len(part.input_ids), own))
            logprobs.append(next(answers).logprobs if own else np.full(len(part.input_ids), np.nan, np.float32))
        inputs = _joined(self.parts)
        return Response(
            inputs.input_ids, np.concatenate(logprobs).astype(np.float32), self.answers[-1].finished,
            Observed(np.concatenate(sampled), inputs),
        )  # fmt: skip


def converse(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling, react: React, done: Callable[[int, list[Response]], None]
) -> list[list[Response]]:
    """G conversations with each prompt, in order. `sampling.max_tokens` is of one answer; `done` hears of each group when it is whole."""
    if hasattr(engine, "converse"):
        return engine.converse(prompts, sampling, react, done)
    talks = [[Talk(prompt, sample) for sample in range(sampling.samples)] for prompt in prompts]
    pending: dict[tuple[int, int], Future[PromptInputs | None]] = {}

    def answered(place: int, sample: int, answer: Response) -> None:
        talks[place][sample].answered(answer)
        pending[place, sample] = react(place, sample, answer)

    def first(place: int, group: list[Response]) -> None:
        for sample, answer in enumerate(group):
            answered(place, sample, answer)

    engine.generate(prompts, sampling, first)
    ends = Ends(talks, done)
    while going := ends.reactions(pending):
        pending.clear()
        following = [talks[place][sample].following() for place, sample in going]

        def later(number: int, group: list[Response], going: list[tuple[int, int]] = going) -> None:
            answered(*going[number], group[0])

        engine.generate(following, replace(sampling, samples=1), later)
    return ends.groups()


class Ends:
    """Which conversations have ended; tells of each group when its last one has. `start`: the number of the first group."""

    def __init__(self, talks: Sequence[Sequence[Talk]], done: Callable[[int, list[Response]], None], start: int = 0) -> None:
        self._talks, self._done, self._start = talks, done, start
        self._open = [len(group) for group in talks]
        self._groups: dict[int, list[Response]] = {}

    def reactions(self, pending: dict[tuple[int, int], Any]) -> list[tuple[int, int]]:
        """Wait for all reactions; observations go into their conversations. (place, sample) of those that go on, in order."""
        going = []
        for (place, sample), reaction in sorted(pending.items()):
            observation = reaction.result()
            if observation is not None:
                self._talks[place][sample].observed(observation)
                going.append((place, sample))
                continue
            self._open[place] -= 1
            if not self._open[place]:
                self._groups[place] = [talk.response() for talk in self._talks[place]]
                self._done(self._start + place, self._groups[place])
        return going

    def groups(self) -> list[list[Response]]:
        return [self._groups[place] for place in range(len(self._talks))]


def _without_images(like: PromptInputs) -> dict[str, np.ndarray]:
    return {name: getattr(like, name)[:0] for name in ("pixels", "image_facts", "image_tokens", "image_rows")}


def _joined(parts: Sequence[PromptInputs]) -> PromptInputs:
    shown = [part for part in parts if len(part.image_rows)] or parts[:1]  # without an image, facts may have no columns
    return PromptInputs(
        np.concatenate([part.input_ids for part in parts]).astype(np.int32),
        np.concatenate([part.positions for part in parts], axis=1).astype(np.int32),
        **joined_pixels(shown),
        videos=sum(part.videos for part in parts),
    )
