"""What an iteration hands to its updates, and the line of metrics.jsonl that each update leaves. No loop in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from terrace.recipe.schema import GrpoOptions, Stage
from terrace.rl.advantages import group_advantages
from terrace.rl.collect import Collected, Collector, Group
from terrace.rl.pools import PASS_REWARD
from terrace.rl.units import TrainGroup, deal_groups, group_cost
from terrace.rl.update import UpdateOutcome
from terrace.train.context import WorkerContext
from terrace.train.step import BatchCounts


def pass_rate(group: Group) -> float:
    """Share of the judged responses that pass; 0 if none was judged."""
    judged = group.rewards[group.rewards == group.rewards]
    return float((judged >= PASS_REWARD).mean()) if len(judged) else 0.0


def own_groups(
    part: Sequence[Group], options: GrpoOptions, collected: Collected, collector: Collector, context: WorkerContext
) -> list[TrainGroup]:
    """This rank's groups of an update with their advantages. Prompts that another rank has decoded are read here."""
    costs = [group_cost(group.prompt_tokens, group.visual_tokens, group.response_tokens) for group in part]
    mine = [part[number] for number in deal_groups(costs, context.world_size, context.rank)]
    missing = [group.drawn for group in mine if group.drawn not in collected.prompts]
    if missing:
        collected.prompts.update(zip(missing, collector.reader.read(missing)))
    made = []
    for group in mine:
        advantages, counted = group_advantages(
            group.rewards, [0] * len(group.rewards), options.normalise, options.baseline
        )
        chosen = [place for place, counts in enumerate(counted) if counts]
        made.append(TrainGroup(
            prompt=collected.prompts[group.drawn],
            responses=tuple(group.responses[place] for place in chosen),
            advantages=tuple(float(advantages[place]) for place in chosen),
        ))  # fmt: skip
    return made


def batch_counts(part: Sequence[Group], stage: Stage, stop: bool) -> BatchCounts:
    """What an update trains on, from what all ranks know."""
    sources = dict.fromkeys(sorted(stage.mixture.weights), 0)
    for group in part:
        sources[group.drawn.key[0]] += len(group.responses)
    return BatchCounts(
        supervised_tokens=sum(group.response_tokens for group in part),
        tokens=sum(group.prompt_tokens + group.response_tokens for group in part),
        samples=sum(len(group.responses) for group in part),
        visual_tokens=sum(group.visual_tokens for group in part),
        packs=len(part),
        samples_per_source=sources,
        max_over_mean_cost=1.0,
        model_flops=0.0,  # not measured: most of an iteration is decoding
        stop=stop,
    )


def update_line(outcome: UpdateOutcome | None, counts: BatchCounts, stage: Stage, seconds: float) -> dict[str, Any]:
    """The fields of metrics.jsonl that every stage has, and those of the policy step."""
    line: dict[str, Any] = {
        "loss": outcome.loss if outcome and math.isfinite(outcome.loss) else None,
        "supervised_tokens": counts.supervised_tokens,
        "tokens": counts.tokens,
        "samples": counts.samples,
        "grad_norm": outcome.grad_norm if outcome and math.isfinite(outcome.grad_norm) else None,
        "step_seconds": seconds,
        "data_wait_seconds": 0.0,
        "tokens_per_second": counts.tokens / seconds,
        "pack_fill": outcome.rows / (outcome.packs * stage.sequence_length) if outcome else 0.0,
        "samples_per_source": counts.samples_per_source,
        "max_over_mean_cost": counts.max_over_mean_cost,
        "visual_tokens": counts.visual_tokens,
    }
    if outcome is None or outcome.skipped:
        line["skipped"] = True
    if outcome is not None:
        line |= {
            "update_seconds": outcome.seconds,
            "logprob_mismatch_mean": outcome.mismatch_mean,
            "logprob_mismatch_max": outcome.mismatch_max,
            "clipped": outcome.clipped,
            "kl": outcome.kl,
        }
    return line


def crossed(step: int, updates: int, every: int) -> bool:
    """Whether a multiple of `every` lies in the last `updates` steps."""
    return step // every > (step - updates) // every
