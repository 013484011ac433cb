"""What a reward sees and says.

A reward is a plain function `list[RewardItem] -> list[float | None]`, options as keyword arguments. A value lies in [0,
1]; None means "could not be judged": it is counted as a failure and left out, it is never a 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class RewardItem(NamedTuple):
    """One response to judge.

    `metadata` may hold `tolerance` (absolute), `choices` ({letter: text}), `image_sizes` and `model_sizes` ([width,
    height] of each image as stored and as the model saw it), `duration` (seconds of the video), `messages` (the whole
    conversation, as data.types.Sample has it). Rewards that run beside the router, not in the sandbox, also find the
    prompt's `images` (encoded files, bytes) there.
    """

    prompt: str
    response: str
    solution: Any
    metadata: dict[str, Any] = {}  # noqa: RUF012 - never written to


def without_images(item: RewardItem) -> RewardItem:
    """The item as plain JSON values: what the sandbox and a service that needs no images get."""
    if "images" not in item.metadata:
        return item
    return item._replace(metadata={key: value for key, value in item.metadata.items() if key != "images"})


Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Outcome:
    """One rule's verdict on one item: a value, or the reason why there is none."""

    value: float | None
    failure: str | None = None


@dataclass(frozen=True)
class Score:
    """The weighted verdict of a task's rules on one response. `value` is None if any rule failed."""

    value: float | None
    parts: dict[str, float | None] = field(default_factory=dict)
    failure: str | None = None


def outcomes_of(values: Sequence[float | None], rule: str) -> list[Outcome]:
    """Check a rule's answers: None and values outside [0, 1] (a mistake in the rule) become failures with a reason."""
    outcomes = []
    for value in values:
        if value is None:
            outcomes.append(Outcome(None, f"{rule}: could not judge"))
        elif not 0.0 <= value <= 1.0:  # also true for NaN
            outcomes.append(Outcome(None, f"{rule}: value {value!r} is outside [0, 1]"))
        else:
            outcomes.append(Outcome(float(value)))
    return outcomes
