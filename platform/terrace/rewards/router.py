"""Reward by task: the rules of the item's task, weighted. One verdict per response, with the reason where there is none.

The weighted mean of values in [0, 1] stays in [0, 1]. If any rule of the task fails on a response, the response has no
reward: a partial sum would be another number under the same name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from terrace.errors import InputError
from terrace.recipe.schema_grpo import RewardRule
from terrace.rewards.registry import load_reward, place_of
from terrace.rewards.sandbox import SandboxPool
from terrace.rewards.types import Outcome, RewardItem, Score, outcomes_of, without_images


@dataclass
class TaskCount:
    """How many responses of a task were judged, and why the others were not."""

    scored: int = 0
    failed: int = 0
    reasons: Counter = field(default_factory=Counter)

    @property
    def failure_rate(self) -> float:
        return self.failed / max(self.scored + self.failed, 1)


class Router:
    """Scores (task, item) pairs. `rewards` maps a task to its rules, as in a recipe's stage."""

    def __init__(self, rewards: Mapping[str, Sequence[RewardRule]], pool: SandboxPool, may_be_empty: bool = False) -> None:
        """`may_be_empty`: environments pay, so that there may be no rule."""
        if not rewards and not may_be_empty:
            raise InputError("no reward is named: a grpo stage needs `rewards: {task: [{name: ...}]}`")
        for rules in rewards.values():
            for rule in rules:
                load_reward(rule.name)  # a wrong name is found before the first rollout
        self._rewards = {task: list(rules) for task, rules in rewards.items()}
        self._pool = pool
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="reward-router")
        self.counts: dict[str, TaskCount] = {task: TaskCount() for task in rewards}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._rewards)

    def submit(self, pairs: Sequence[tuple[str, RewardItem]]) -> Future[list[Score]]:
        """Score in the background, so that other responses can still be decoded meanwhile."""
        return self._threads.submit(self.score, pairs)

    def score(self, pairs: Sequence[tuple[str, RewardItem]]) -> list[Score]:
        """Scores in the order of the pairs. A task without rules is an input error that names it."""
        scores: list[Score | None] = [None] * len(pairs)
        by_task: dict[str, list[int]] = {}
        for place, (task, _) in enumerate(pairs):
            if task not in self._rewards:
                raise InputError(
                    f"task {task!r} has no reward: name one under `rewards`, which has {', '.join(self._rewards)}"
                )
            by_task.setdefault(task, []).append(place)
        for task, places in by_task.items():
            for place, score in zip(places, self._score_task(task, [pairs[place][1] for place in places])):
                scores[place] = score
        return [score for score in scores if score is not None]

    def _score_task(self, task: str, items: list[RewardItem]) -> list[Score]:
        rules = self._rewards[task]
        outcomes = [self._judge(rule, items) for rule in rules]
        total = sum(rule.weight for rule in rules)
        scores = []
        for place in range(len(items)):
            mine = [outcome[place] for outcome in outcomes]
            parts = {rule.name: outcome.value for rule, outcome in zip(rules, mine)}
            failure = next((outcome.failure for outcome in mine if outcome.value is None), None)
            value = None if failure else sum(rule.weight * outcome.value for rule, outcome in zip(rules, mine)) / total
            reasons = {rule.name: f"{outcome.read!r}: {outcome.rule}" for rule, outcome in zip(rules, mine) if outcome.rule or outcome.read}
            scores.append(Score(value, parts, failure, reasons, sum(outcome.seconds for outcome in mine)))
        count = self.counts[task]
        failures = [score.failure for score in scores if score.failure]
        count.scored += len(scores) - len(failures)
        count.failed += len(failures)
        count.reasons.update(failures)
        return scores

    def _judge(self, rule: RewardRule, items: list[RewardItem]) -> list[Outcome]:
        if place_of(rule.name) == "sandbox":
            return self._pool.judge(rule.name, [without_images(item) for item in items], rule.options)
        return outcomes_of(load_reward(rule.name)(items, **rule.options), rule.name, len(items))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
