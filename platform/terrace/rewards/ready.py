"""Whether prompts can be judged before a stage begins: a task with a reward, a solution that its rule reads, and full value for a
response that states it.

A row that fails here would be met at draw time, days into a stage. `unready` names every such row, so that a stage refuses to
start, or leaves the named rows out because its recipe says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from terrace.errors import InputError
from terrace.rewards.registry import BUILT_IN, load_reward, place_of
from terrace.rewards.types import Outcome, RewardItem

FULL_VALUE = 1 - 1e-6


@dataclass(frozen=True)
class Prompt:
    """What judging needs of one prompt."""

    id: str
    task: str
    solution: Any
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a prompt cannot be judged, and what to change."""

    id: str
    task: str
    reason: str

    def __str__(self) -> str:
        return f"prompt {self.id} (task {self.task or 'none'}): {self.reason}"


def stated_solution(rule: str, item: RewardItem, options: Mapping[str, Any]) -> str | None:
    """A response that states the item's solution in the form that the rule asks for; None where there is no such thing.

    A built-in rule's module says it itself (`stating(item, options)`); for a custom rule it is the solution as text."""
    function = load_reward(rule)
    stating = getattr(importlib.import_module(function.__module__), "stating", None)
    if stating is not None:
        return stating(item, options)
    if rule in BUILT_IN or isinstance(item.solution, bool) or not isinstance(item.solution, str | int | float):
        return None
    return str(item.solution)


def unready(prompts: Iterable[Prompt], rewards: Mapping[str, Sequence[Any]], judge: Any) -> list[Problem]:
    """The prompts that a stage with these `rewards` (task -> rules with `name` and `options`) cannot judge, in order.

    `judge` is `SandboxPool.judge`. Rules beside the router (services, reward models) are not asked, and a custom rule only has
    to answer: what it makes of the solution as text is its own affair.
    """
    problems: dict[int, Problem] = {}
    items: dict[str, list[tuple[int, Prompt]]] = {}
    for place, prompt in enumerate(prompts):
        if prompt.task not in rewards:
            named = ", ".join(rewards) or "none"
            problems[place] = Problem(
                prompt.id,
                prompt.task,
                f"its task has no reward; name one under `rewards` (it has: {named}), or give the row another `task`",
            )
        else:
            items.setdefault(prompt.task, []).append((place, prompt))
    for task, placed in items.items():
        for rule in rewards[task]:
            if place_of(rule.name) == "sandbox":
                for place, reason in _of_rule(rule.name, dict(rule.options), [one for one in placed if one[0] not in problems], judge):
                    problems[place] = Problem(dict(placed)[place].id, task, reason)
    return [problems[place] for place in sorted(problems)]


def _of_rule(rule: str, options: dict[str, Any], placed: list[tuple[int, Prompt]], judge: Any) -> list[tuple[int, str]]:
    needs = getattr(load_reward(rule), "needs_solution", True)
    found: list[tuple[int, str]] = []
    asked: list[tuple[int, RewardItem]] = []
    for place, prompt in placed:
        if prompt.solution in (None, "", [], {}):
            if needs and rule in BUILT_IN:
                found.append((place, f"it has no `solution`, which the reward {rule} needs"))
            continue
        item = RewardItem("", "", prompt.solution, dict(prompt.metadata))
        try:
            response = stated_solution(rule, item, options)
        except (InputError, ValueError, KeyError, TypeError, IndexError) as error:
            found.append((place, f"the reward {rule} cannot read the solution {_short(prompt.solution)} ({error})"))
            continue
        if response is not None:
            asked.append((place, item._replace(response=response)))
        elif rule in BUILT_IN and needs and getattr(load_reward(rule), "needs_statement", True):
            found.append((place, f"the reward {rule} cannot read the solution {_short(prompt.solution)}; see its forms in docs/rl.md"))
    outcomes: Sequence[Outcome] = judge(rule, [item for _, item in asked], options) if asked else ()
    for (place, item), outcome in zip(asked, outcomes):
        if outcome.value is None:
            found.append((place, f"the solution {_short(item.solution)} cannot be judged: {outcome.failure}"))
        elif rule in BUILT_IN and outcome.value < FULL_VALUE:
            earned = f"given as the answer, earns {outcome.value:.3g} by {rule} ({outcome.rule})"
            found.append((place, f"the solution {_short(item.solution)}, {earned}; mend it"))
    return found


def _short(solution: Any) -> str:
    return repr(solution)[:80]
