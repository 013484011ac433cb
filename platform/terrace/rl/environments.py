"""Conversations with environments: each answer goes to the environment of its task, what it shows is encoded and read by the policy.

The environment runs in the sandbox (`rewards.environment`), one call for each answer, while other conversations still decode. Its state
lies here between the calls. What a conversation is worth is the sum of what was paid; a call that fails makes it a conversation
without a value, counted as a failed reward, never a 0.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from terrace.data.images import ImageDamage, image_size
from terrace.data.prompt import read_observation
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import PromptInputs, Sample, next_positions, no_pixels
from terrace.errors import InputError
from terrace.families.interface import Bounds, Family
from terrace.generation.interface import Prompt, Response, RolloutEngine, Sampling
from terrace.generation.turns import converse
from terrace.recipe.schema_grpo import EnvironmentRule
from terrace.rewards.environment import load_environment, sees_images, target_of
from terrace.rewards.ready import Prompt as Judged
from terrace.rewards.sandbox import SandboxPool

THREADS = 4  # that wait for the sandbox and decode pictures


@dataclass
class _Talk:
    """What has to be known of one conversation between two answers."""

    messages: list[dict[str, Any]]
    images: list[bytes]
    sizes: list[tuple[int, int]]
    scales: list[tuple[int, int]]
    following: np.ndarray  # int64 [P]: the positions of the next token
    begun: int  # messages of the prompt
    shown: int  # images of the prompt
    kept: dict[str, Any] = field(default_factory=dict)  # the environment's state
    turn: int = 0
    paid: list[float] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Sights:
    """How observations are seen: `bounds` says within which pixels, by source."""

    tokenizer: TextTokenizer
    family: Family
    bounds: Callable[[str], Bounds]
    max_image_pixels: int


class Environments:
    """The environments of a stage by task. `judged` are the tasks whose rules judge the last answer instead."""

    def __init__(
        self, rules: Mapping[str, EnvironmentRule], judged: Sequence[str], sandbox: SandboxPool, sights: Sights
    ) -> None:
        for rule in rules.values():
            load_environment(rule.name)  # a wrong name is found before the first rollout
        self._rules, self._judged, self._sandbox, self._sights = dict(rules), frozenset(judged), sandbox, sights
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="environments")

    def __contains__(self, task: str) -> bool:
        return task in self._rules

    def generate(
        self, engine: RolloutEngine, prompts: Sequence[Prompt], sampling: Sampling, ready: Callable[[int, list[Response]], None] | None
    ) -> list[list[Response]]:
        """G responses to each prompt, in order; to those of a task with an environment, whole conversations."""
        alone = [place for place, prompt in enumerate(prompts) if prompt.task not in self]
        groups: list[list[Response]] = [[] for _ in prompts]

        def tell(places: Sequence[int]) -> Callable[[int, list[Response]], None]:
            return lambda number, group: ready(places[number], group) if ready is not None else None

        if alone:
            for place, group in zip(alone, engine.generate([prompts[place] for place in alone], sampling, tell(alone))):
                groups[place] = group
        talking = [place for place, prompt in enumerate(prompts) if prompt.task in self]
        if talking:
            conversations = _Conversations(self, [prompts[place] for place in talking])
            for place, group in zip(talking, conversations.run(engine, sampling, tell(talking))):
                groups[place] = group
        return groups

    def problems(self, prompts: Sequence[Judged], images: Sequence[Sequence[bytes]], source: str) -> Iterator[tuple[str, str]]:
        """(id, reason) of those whose environment cannot talk about them: it is asked how it reacts to an empty answer."""
        for prompt, reason in zip(prompts, self._threads.map(lambda pair: self._problem(*pair, source), zip(prompts, images))):
            if reason is not None:
                yield prompt.id, reason

    def _problem(self, prompt: Judged, images: Sequence[bytes], source: str) -> str | None:
        positions = np.zeros((self._sights.family.position_rows, 1), np.int32)
        inputs = PromptInputs(np.zeros(1, np.int32), positions, **no_pixels(self._sights.family.row_values, self._sights.family.fact_count))
        asked = Prompt(
            **vars(inputs), key=(source, 0), id=prompt.id, task=prompt.task, solution=prompt.solution, metadata=dict(prompt.metadata),
            images=tuple(images),
        )  # fmt: skip
        talk = talk_about(asked)
        self.react(asked, talk, Response(np.zeros(1, np.int32), np.zeros(1, np.float32), True), "")
        return talk.failure

    # ------------------------------------------------------------ one answer

    def submit(self, prompt: Prompt, talk: _Talk, answer: Response, text: str) -> Future[PromptInputs | None]:
        return self._threads.submit(self.react, prompt, talk, answer, text)

    def react(self, prompt: Prompt, talk: _Talk, answer: Response, text: str) -> PromptInputs | None:
        """What the policy reads next; None where the conversation has ended."""
        rule = self._rules[prompt.task]
        talk.turn += 1
        talk.following = talk.following + len(answer.tokens)
        talk.messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        said = self._sandbox.step(target_of(rule.name), self._call(prompt, talk, rule, answer), rule.options)
        if "failure" in said:
            talk.failure = f"environment {rule.name}: {said['failure']}"
            return None
        talk.kept = said["kept"]
        if said["reward"] is not None:
            talk.paid.append(said["reward"])
        if said["done"] or talk.turn == rule.turns or not answer.finished:
            self._close(prompt, talk, rule, said["done"])
            return None
        return self._shown(prompt, talk, rule, said["items"])

    def _call(self, prompt: Prompt, talk: _Talk, rule: EnvironmentRule, answer: Response) -> dict[str, Any]:
        metadata = {key: value for key, value in prompt.metadata.items() if key != "messages"}
        metadata |= {"image_sizes": [list(size) for size in talk.sizes], "model_sizes": [list(scale) for scale in talk.scales]}
        given = {
            "solution": prompt.solution, "metadata": metadata, "turn": talk.turn, "turns": rule.turns, "cut": not answer.finished,
        }  # fmt: skip
        if sees_images(rule.name):
            given["images"] = [base64.b64encode(image).decode() for image in talk.images]
        return {"conversation": talk.messages, "response": talk.messages[-1]["content"][0]["text"], "kept": talk.kept, "given": given}

    def _close(self, prompt: Prompt, talk: _Talk, rule: EnvironmentRule, done: bool) -> None:
        if prompt.task in self._judged:
            if talk.paid:
                talk.failure = f"environment {rule.name}: it pays, and `rewards` of task {prompt.task} does too; leave one out"
        elif done and not talk.paid:
            talk.failure = f"environment {rule.name}: it says done and never named a reward"
        elif sum(talk.paid) > 1 + 1e-9:
            talk.failure = f"environment {rule.name}: it paid {sum(talk.paid):.4g} in all, more than 1"

    def _shown(self, prompt: Prompt, talk: _Talk, rule: EnvironmentRule, items: Sequence[Mapping[str, str]]) -> PromptInputs | None:
        """The observation as the next turn. Damaged or too long ones are failures of the conversation."""
        sights, content, bounds = self._sights, [], self._sights.bounds(prompt.key[0])
        try:
            for item in items:
                if "text" in item:
                    content.append({"type": "text", "text": item["text"]})
                    continue
                image = base64.b64decode(item["image"])
                content.append({"type": "image", "image": len(talk.images)})
                talk.images.append(image)
                talk.sizes.append(image_size(image, sights.max_image_pixels))
                height, width = sights.family.view(*talk.sizes[-1], bounds).scale
                talk.scales.append((width, height))
            talk.messages.append({"role": "user", "content": content})
            sample = Sample(prompt.id, "prompt", talk.messages, {})
            seen = read_observation(
                sample, talk.images, talk.sizes, sights.tokenizer, sights.family, bounds, talk.following, sights.max_image_pixels
            )
        except ImageDamage as error:
            talk.failure = f"environment {rule.name}: a picture of its observation cannot be read ({error})"
            return None
        except InputError as error:
            raise InputError(f"environment {rule.name} of task {prompt.task}: {error}") from error
        if len(seen.input_ids) > rule.max_observation_tokens:
            talk.failure = (
                f"environment {rule.name}: an observation of {len(seen.input_ids)} tokens is longer than max_observation_tokens "
                f"{rule.max_observation_tokens}; show less, or raise it"
            )
            return None
        talk.following = next_positions(seen.positions)
        return seen

    def outcome(self, prompt: Prompt, talk: _Talk, response: Response) -> Response:
        """The response with what became of its conversation."""
        assert response.observed is not None
        judged = prompt.task in self._judged or talk.failure is not None
        return replace(response, observed=replace(
            response.observed,
            value=None if judged else float(min(sum(talk.paid), 1.0)),
            failure=talk.failure,
            messages=tuple(talk.messages[talk.begun :]),
            images=tuple(talk.images[talk.shown :]),
        ))  # fmt: skip

    def text_of(self, answer: Response) -> str:
        """The answer as text, without end marks."""
        return self._sights.tokenizer.decode(answer.tokens.tolist(), skip_special_tokens=True)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Conversations:
    """Those with some prompts, of one call of an engine."""

    def __init__(self, environments: Environments, prompts: Sequence[Prompt]) -> None:
        self._environments, self._prompts = environments, prompts
        self._talks: dict[tuple[int, int], _Talk] = {}

    def run(self, engine: RolloutEngine, sampling: Sampling, ready: Callable[[int, list[Response]], None]) -> list[list[Response]]:
        groups: dict[int, list[Response]] = {}

        def done(place: int, group: list[Response]) -> None:
            groups[place] = [
                self._environments.outcome(self._prompts[place], self._talks[place, sample], response)
                for sample, response in enumerate(group)
            ]
            ready(place, groups[place])

        converse(engine, self._prompts, sampling, self._react, done)
        return [groups[place] for place in range(len(self._prompts))]

    def _react(self, place: int, sample: int, answer: Response) -> Future[PromptInputs | None]:
        prompt = self._prompts[place]
        talk = self._talks.setdefault((place, sample), talk_about(prompt))
        return self._environments.submit(prompt, talk, answer, self._environments.text_of(answer))


def talk_about(prompt: Prompt) -> _Talk:
    """A conversation that begins with a prompt."""
    metadata = prompt.metadata
    messages = metadata["messages"]
    messages = list(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    sizes, scales = ([tuple(size) for size in metadata[key]] for key in ("image_sizes", "model_sizes"))
    return _Talk(messages, list(prompt.images), sizes, scales, prompt.next_positions, len(messages), len(prompt.images))


def transcript(response: Response, last: str) -> str:
    """A response in words: what the policy said, and in brackets what answered. `last` is the text of one without observations."""
    if response.observed is None:
        return last
    parts = []
    for message in response.observed.messages:
        said = "".join(item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in message["content"])
        parts.append(said if message["role"] == "assistant" else f"[{said}]")
    return "\n".join(parts)
