"""What an iteration hands to its updates: groups with advantages, counts, and its own figures. No loop in here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from terrace.objectives.interface import Counts
from terrace.recipe.schema import Stage
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.rl.advantages import group_advantages, overlong_penalties
from terrace.rl.collect import Collected, Collector, Group
from terrace.rl.exchange import delivered
from terrace.rl.figures import mean_reward
from terrace.rl.pools import PASS_REWARD
from terrace.rl.units import TrainGroup, deal_groups, group_cost
from terrace.worker.context import WorkerContext


def pass_rate(group: Group) -> float:
    """Share of the judged responses that pass; 0 if none was judged."""
    judged = group.rewards[group.rewards == group.rewards]
    return float((judged >= PASS_REWARD).mean()) if len(judged) else 0.0


IDLE = "idle_share_of_rollout_seconds"  # of the engine's rows: nothing was decoded in them


def own_groups(
    part: Sequence[Group], options: GrpoOptions, collected: Collected, collector: Collector, context: WorkerContext
) -> list[TrainGroup]:
    """This rank's groups of an update with their advantages. Responses that another rank has sampled come from there; its prompts
    are read here. All ranks call it."""
    costs = [group_cost(group.prompt_tokens, group.visual_tokens, group.response_tokens) for group in part]
    owners = [0] * len(part)
    for rank in range(context.world_size):
        for number in deal_groups(costs, context.world_size, rank):
            owners[number] = rank
    own = {group.drawn: group for group in delivered(part, owners, context)}
    mine = [own[part[number].drawn] for number in deal_groups(costs, context.world_size, context.rank)]
    missing = [group.drawn for group in mine if group.drawn not in collected.prompts]
    if missing:
        collected.prompts.update(zip(missing, collector.reader.read(missing)))
    advantages = dict(zip((group.drawn for group in part), part_advantages(part, options)))
    made = []
    for group in mine:
        values = advantages[group.drawn]
        chosen = [place for place, value in enumerate(values) if not np.isnan(value)]
        if chosen:
            made.append(TrainGroup(
                prompt=collected.prompts[group.drawn],
                responses=tuple(group.responses[place] for place in chosen),
                advantages=tuple(float(values[place]) for place in chosen),
            ))  # fmt: skip
    return made


def part_advantages(part: Sequence[Group], options: GrpoOptions) -> list[np.ndarray]:
    """The advantages of every group of an update, float64 [samples] each; NaN for a response that does not train."""
    if not part:
        return []
    rewards = [shaped_rewards(group, options) for group in part]
    places = np.repeat(np.arange(len(part)), [len(own) for own in rewards])
    advantages, counted = group_advantages(np.concatenate(rewards), places, options.normalise, options.baseline)
    if options.truncated == "leave_out":
        counted &= np.asarray([response.finished for group in part for response in group.responses])
    return np.split(np.where(counted, advantages, np.nan), np.cumsum([len(own) for own in rewards])[:-1])


def shaped_rewards(group: Group, options: GrpoOptions) -> np.ndarray:
    """float64 [samples]: the rewards, less what a response loses for its length. Which groups teach is decided before, by the
    rewards alone: a group of equal answers would teach nothing but to be short."""
    if options.overlong_buffer_tokens is None:
        return group.rewards
    lengths = np.asarray([response.longest_answer for response in group.responses])
    longest, buffer = options.max_response_tokens, options.overlong_buffer_tokens
    return group.rewards + overlong_penalties(lengths, longest, buffer, options.overlong_penalty)


def part_counts(part: Sequence[Group], stage: Stage) -> Counts:
    """What an update trains on, from what all ranks know."""
    sources = dict.fromkeys(stage.mixture.weights, 0)
    for group in part:
        sources[group.drawn.key[0]] += len(group.responses)
    return Counts(
        tokens=sum(group.prompt_tokens + group.response_tokens for group in part),
        samples=sum(len(group.responses) for group in part),
        visual_tokens=sum(group.visual_tokens for group in part),
        samples_per_source=sources,
    )


def iteration_figures(
    iteration: int, collected: Collected, figures: dict[str, dict[str, float]], easy_pool: int, sync_seconds: float,
    idle: float | None = None,
) -> dict[str, Any]:
    """The fields of metrics.jsonl that an iteration has once, in the line of its first update."""
    return {
        "iteration": iteration + 1,
        "reward": mean_reward(figures),
        "tasks": figures,
        "groups_kept": len(collected.kept),
        "groups_drawn": len(collected.groups),
        "groups_without_difference": collected.selection.without_difference,
        "groups_unjudged": collected.selection.unjudged,
        "groups_surplus": collected.selection.surplus,
        **({"unready_prompts": len(collected.unready)} if collected.unready else {}),
        "sampling_rounds": collected.rounds,
        **staleness(iteration, collected),
        "easy_pool": easy_pool,
        "sync_seconds": sync_seconds,
        "rollout_seconds": collected.rollout_seconds,
        "reward_seconds": collected.reward_seconds,
        **({} if idle is None else {IDLE: idle}),
    }


def staleness(iteration: int, collected: Collected) -> dict[str, float]:
    """How many iterations older the oldest weights were that sampled what trains, over groups: mean and most; and what else became of
    groups."""
    if not collected.overlapped:
        return {}
    behind = [iteration - group.ages[0] for group in collected.kept] or [0]
    return {
        "staleness_mean": float(np.mean(behind)), "staleness_max": float(max(behind)),
        "groups_stale": float(len(collected.stale)), "groups_waiting": float(collected.waiting),
    }  # fmt: skip
