"""Watches for reward hacking: reward that rises while the answers' form collapses.

Pure functions over the per-iteration figures of one task. MORL's authors report that grounding and counting shorten the
responses by themselves, so a shorter answer alone is no alarm: the reward must rise at the same time and the form must
lose most of its length or of its variety. An alarm is a message for a person and a metric; it never changes a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """One iteration of one task."""

    reward: float  # mean over judged responses
    response_tokens: float  # mean length
    distinct_answers: float  # share of different response texts among all, in (0, 1]
    at_length_limit: float  # share of responses cut at the length limit


@dataclass(frozen=True)
class AlarmLimits:
    """When form counts as collapsed, comparing the mean of the last `window` iterations with the first `window`."""

    window: int = 8
    reward_rise: float = 0.1
    length_share: float = 0.3  # mean length fell below this share of what it was
    length_growth: float = 3.0  # or grew by this factor while cut responses became usual
    distinct_share: float = 0.3  # the share of distinct responses fell below this share of what it was
    cut_share: float = 0.5


def distinct_share(responses: Sequence[str]) -> float:
    """The share of different texts among `responses` (white space ignored); 1 for none."""
    return len({" ".join(response.split()) for response in responses}) / len(responses) if responses else 1.0


def hacking_alarms(task: str, history: Sequence[Form], limits: AlarmLimits = AlarmLimits()) -> list[str]:
    """Messages, empty while all is well or while there are fewer than two windows of history."""
    if len(history) < 2 * limits.window:
        return []
    first, last = _mean(history[: limits.window]), _mean(history[-limits.window :])
    if last.reward - first.reward < limits.reward_rise:
        return []
    rise = f"task {task}: mean reward rose from {first.reward:.3f} to {last.reward:.3f} while"
    alarms = []
    if last.response_tokens < limits.length_share * first.response_tokens:
        alarms.append(f"{rise} responses shrank from {first.response_tokens:.0f} to {last.response_tokens:.0f} tokens")
    if last.distinct_answers < limits.distinct_share * first.distinct_answers:
        alarms.append(
            f"{rise} distinct responses fell from {first.distinct_answers:.0%} to {last.distinct_answers:.0%}"
        )
    if last.response_tokens > limits.length_growth * first.response_tokens and last.at_length_limit > limits.cut_share:
        alarms.append(f"{rise} {last.at_length_limit:.0%} of the responses run into the length limit")
    return alarms


def _mean(history: Sequence[Form]) -> Form:
    count = len(history)
    return Form(
        reward=sum(form.reward for form in history) / count,
        response_tokens=sum(form.response_tokens for form in history) / count,
        distinct_answers=sum(form.distinct_answers for form in history) / count,
        at_length_limit=sum(form.at_length_limit for form in history) / count,
    )
