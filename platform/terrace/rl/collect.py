"""The first half of an iteration: draw prompts, decode, score, until enough groups teach something.

Every rank draws the same prompts and rolls out every world_size-th of them. Groups are scored in the background as soon
as they are complete, while others still decode. Ranks then tell each other rewards and lengths, so that all of them select the
same groups; responses travel to the rank that trains them (`exchange.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.order.permutation import seed_of
from terrace.data.tokenizer import TextTokenizer
from terrace.errors import TerraceError
from terrace.generation.interface import Prompt, Response, RolloutEngine, Sampling
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.rewards.alarm import distinct_share
from terrace.rewards.router import Router
from terrace.rewards.types import RewardItem, Score
from terrace.rl.dynamic_sampling import Selection, prompts_to_draw, select_groups
from terrace.rl.environments import Environments, transcript
from terrace.rl.exchange import told
from terrace.rl.prompts import Drawn, PromptOrder, PromptReader
from terrace.rl.stored import StoredReward, load_rewards, load_rollout, save_rewards, save_rollout
from terrace.rl.trace import Trace
from terrace.worker.collectives import gather_objects
from terrace.worker.context import WorkerContext


class RewardFailures(TerraceError):
    """More rewards failed than the recipe allows."""


@dataclass(frozen=True)
class Group:
    """One prompt's scored responses as all ranks know them."""

    drawn: Drawn
    id: str
    task: str
    prompt_tokens: int
    visual_tokens: int
    responses: tuple[Response, ...]  # of a group that another rank has sampled: rl.exchange.Outline
    rewards: np.ndarray  # float64 [G], NaN where the reward failed
    failures: tuple[str, ...]
    texts: tuple[str, ...]
    question: str
    solution: str
    reasons: tuple[Mapping[str, str], ...] = ()  # per response, by rule: what was read as the answer and what decided
    distinct: float = 1.0  # share of different texts
    ages: tuple[int, int] = (-1, -1)  # the oldest and the newest weights that sampled a token; -1 where the engine does not tell

    @property
    def whole(self) -> bool:
        """Whether this rank has its responses and texts: it has sampled them."""
        return bool(self.texts)

    @property
    def response_tokens(self) -> int:
        return sum(len(response.tokens) for response in self.responses)


@dataclass
class Collected:
    """All groups of an iteration in the order they were drawn, and which of them train."""

    groups: list[Group]
    selection: Selection
    rounds: int
    rollout_seconds: float
    reward_seconds: float  # waited for rewards after decoding
    prompts: dict[Drawn, Prompt] = field(default_factory=dict)  # those that this rank has read
    damaged: list[str] = field(default_factory=list)  # `source/sample` that some rank could not read and left out
    unready: list[str] = field(default_factory=list)  # `source/sample` that was drawn and cannot be judged, left out
    # Without rounds, by the numbers of draws:
    draws: tuple[int, int] | None = None  # those that are decided: the first, and behind the last
    damaged_draws: list[int] = field(default_factory=list)
    unready_draws: list[int] = field(default_factory=list)
    stale: list[Group] = field(default_factory=list)  # too old to train, beside `groups`
    overlapped: bool = False  # generation goes on meanwhile
    waiting: int = 0  # judged groups that are kept for the next iteration

    @property
    def kept(self) -> list[Group]:
        return [self.groups[place] for place in self.selection.kept]


@dataclass
class Collector:
    """What collecting needs that does not change between iterations."""

    order: PromptOrder
    reader: PromptReader
    engine: RolloutEngine
    router: Router
    tokenizer: TextTokenizer
    options: GrpoOptions
    seed: int
    stage_hash: str
    context: WorkerContext
    environments: Environments
    new_prompts: dict[Drawn, Prompt] = field(default_factory=dict)  # that this rank has read in the iteration

    trace: Trace = field(default_factory=Trace)

    def close(self) -> None:
        """End what is generated beside the iterations."""

    def collect(self, iteration: int, folder: Path, doing: Callable[[str], None]) -> Collected:
        """Rounds of prompts until `prompts_per_iteration` groups are kept, the rounds are used up, or the order
        ends. `doing` is told before whatever may take long."""
        wanted, dynamic = self.options.prompts_per_iteration, self.options.dynamic_sampling
        counter: Counter[tuple[str, int]] = Counter()
        collected = Collected([], select_groups([], wanted, dynamic), 0, 0.0, 0.0)
        for number in range(self.options.max_sampling_rounds if dynamic else 1):
            selection = collected.selection
            kept = len(selection.kept)
            drawn = self.order.draw(prompts_to_draw(wanted - kept, kept, len(collected.groups)), counter)
            if not drawn:
                break
            drawn, unready = self.reader.without_unready(drawn)
            collected.unready += unready
            collected.groups += self._round(iteration, number, drawn, folder, collected, doing)
            collected.rounds = number + 1
            collected.selection = select_groups([group.rewards for group in collected.groups], wanted, dynamic)
            self._check_failures(collected.groups, iteration)
            if collected.selection.missing <= 0:
                break
        return collected

    def score_once(self, drawn: Sequence[Drawn], sampling: Sampling) -> list[Group]:
        """One response set for each prompt, scored: for held-out prompts. This rank's share is gathered from all."""
        drawn, _ = self.reader.without_unready(drawn)
        usable, _ = self.reader.read_usable(drawn[self.context.rank :: self.context.world_size])
        prompts = [prompt for _, prompt in usable]
        with self.engine.together():
            groups = self.environments.generate(self.engine, prompts, sampling, None) if prompts else []
        futures = [self._submit(prompt, group) for prompt, group in zip(prompts, groups)]
        rewards = [reward_values(future.result()) for future in futures]
        own = [self._group(*four) for four in zip([one for one, _ in usable], prompts, groups, rewards)]
        return self._exchange(own, drawn)[0]

    def _round(
        self,
        iteration: int,
        number: int,
        drawn: Sequence[Drawn],
        folder: Path,
        collected: Collected,
        doing: Callable[[str], None],
    ) -> list[Group]:
        context = self.context
        started = time.perf_counter()
        doing("reading the prompts of")
        usable, damaged = self.reader.read_usable(drawn[context.rank :: context.world_size])
        mine, prompts = [one for one, _ in usable], [prompt for _, prompt in usable]
        collected.prompts.update(usable)
        identity = {
            "stage": self.stage_hash, "iteration": iteration, "round": number, "rank": context.rank,
            "world_size": context.world_size, "prompts": [[*one.key, one.occurrence] for one in mine],
        }  # fmt: skip
        rollout_file = folder / f"rollout-{number}-{context.rank}.npz"
        reward_file = folder / f"rewards-{number}-{context.rank}.json"
        rewards = load_rewards(reward_file, identity)
        futures: dict[int, Future[list[Score]]] = {}

        def ready(place: int, group: list[Response]) -> None:
            doing("decoding the rollouts of")
            if rewards is None:
                futures[place] = self._submit(prompts[place], group)

        groups = load_rollout(rollout_file, identity)
        doing("decoding the rollouts of")
        with self.engine.together():
            if groups is None:
                sampling = Sampling(
                    samples=self.options.samples_per_prompt,
                    max_tokens=self.options.max_response_tokens,
                    temperature=self.options.temperature,
                    top_p=self.options.top_p,
                    seed=seed_of(self.seed, "rollout", iteration),
                )
                groups = self.environments.generate(self.engine, prompts, sampling, ready) if prompts else []
                save_rollout(rollout_file, identity, groups)
            else:
                for place, group in enumerate(groups):
                    ready(place, group)
        decoded = time.perf_counter()
        if rewards is None:
            rewards = []
            for place in range(len(groups)):
                doing("waiting for the rewards of")
                rewards.append(reward_values(futures[place].result()))
            save_rewards(reward_file, identity, rewards)
        collected.rollout_seconds += decoded - started
        collected.reward_seconds += time.perf_counter() - decoded
        doing("exchanging the groups of all ranks of")
        own = [self._group(*four) for four in zip(mine, prompts, groups, rewards)]
        found, left_out = self._exchange(own, drawn, damaged)
        collected.damaged += left_out
        return found

    def _submit(self, prompt: Prompt, group: Sequence[Response]) -> Future[list[Score]]:
        if prompt.task not in self.router.tasks:  # its environment has paid
            paid: Future[list[Score]] = Future()
            paid.set_result([_of_environment(response) for response in group])
            return paid
        begin, trace = time.time(), self.trace
        metadata, judged = prompt.reward_metadata, [response for response in group if _failure(response) is None]
        scores = self.router.submit([
            (prompt.task, RewardItem(prompt.text, self.answer_of(response), prompt.solution, metadata)) for response in judged
        ])  # fmt: skip
        scores.add_done_callback(lambda _: trace.note("rewards", begin))
        return scores if len(judged) == len(group) else with_failures(scores, group)

    def answer_of(self, response: Response) -> str:
        """The last answer as text, without end marks."""
        tokens = response.tokens
        if response.observed is not None:
            tokens = tokens[len(tokens) - int(np.argmin(np.append(response.observed.sampled[::-1], False))) :]
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)

    def text_of(self, response: Response) -> str:
        """The response in words: the answer, or the whole conversation behind the prompt."""
        return transcript(response, self.answer_of(response))

    def _group(
        self,
        drawn: Drawn,
        prompt: Prompt,
        responses: Sequence[Response],
        rewards: Sequence[StoredReward],
    ) -> Group:
        texts = tuple(self.text_of(response) for response in responses)
        return Group(
            drawn=drawn,
            id=prompt.id,
            task=prompt.task,
            prompt_tokens=len(prompt.input_ids),
            visual_tokens=int(prompt.image_tokens.sum()) + sum(response.visual_tokens for response in responses),
            responses=tuple(responses),
            rewards=np.asarray([np.nan if value is None else value for value, _, _ in rewards], np.float64),
            failures=tuple(reason or "" for value, reason, _ in rewards if value is None),
            texts=texts,
            question=prompt.text,
            solution=str(prompt.solution),
            reasons=tuple(reasons for _, _, reasons in rewards),
            distinct=distinct_share(texts),
            ages=ages_of(responses),
        )

    def _exchange(
        self, own: list[Group], drawn: Sequence[Drawn], damaged: Sequence[str] = ()
    ) -> tuple[list[Group], list[str]]:
        """All ranks' groups in the order they were drawn, those of other ranks without words, and what was left out as damaged."""
        hands: list[Any] = gather_objects(([told(group) for group in own], list(damaged)), self.context)
        groups = {group.drawn: group for hand, _ in hands for group in hand} | {group.drawn: group for group in own}
        return [groups[one] for one in drawn if one in groups], [name for _, names in hands for name in names]

    def _check_failures(self, groups: Sequence[Group], iteration: int) -> None:
        total = sum(len(group.rewards) for group in groups)
        reasons = Counter(reason for group in groups for reason in group.failures)
        failed = sum(reasons.values())
        if failed > self.options.max_reward_failure_rate * total:
            listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            raise RewardFailures(
                f"iteration {iteration}: {failed} of {total} rewards failed ({listed}), more than max_reward_failure_rate "
                f"{self.options.max_reward_failure_rate}; none was counted as 0. Repair the reward, then resume"
            )


def _failure(response: Response) -> str | None:
    return None if response.observed is None else response.observed.failure


def _of_environment(response: Response) -> Score:
    assert response.observed is not None
    said = {"environment": f"{response.observed.turns} answers"}
    return Score(response.observed.value, failure=response.observed.failure, reasons=said)


def with_failures(scores: Future[list[Score]], group: Sequence[Response]) -> Future[list[Score]]:
    """Scores of all of a group, from those of the conversations that did not fail."""
    whole: Future[list[Score]] = Future()

    def complete(_: Any) -> None:
        try:
            found = iter(scores.result())
            whole.set_result([next(found) if _failure(one) is None else Score(None, failure=_failure(one)) for one in group])
        except BaseException as error:
            whole.set_exception(error)

    scores.add_done_callback(complete)
    return whole


def ages_of(responses: Sequence[Response]) -> tuple[int, int]:
    """The oldest and the newest weights that sampled a token of these; -1 where the engine does not tell."""
    versions = [one.versions for one in responses if one.versions is not None and len(one.versions)]
    return (min(int(one.min()) for one in versions), max(int(one.max()) for one in versions)) if versions else (-1, -1)


def reward_values(scores: Sequence[Score]) -> list[StoredReward]:
    """What of scores is kept on disk."""
    return [(score.value, score.failure, score.reasons) for score in scores]
