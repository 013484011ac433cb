"""What a reward sees and says.

A reward is a plain function `list[RewardItem] -> list[float | None]`, options as keyword arguments. A value lies in [0,
1]; None means "could not be judged": it is counted as a failure and left out, it is never a 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from terrace.errors import InputError


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


class Judgement(float):
    """A value that knows what it rests on: `read`, the text that was taken as the answer, and `rule`, what decided."""

    read: str
    rule: str

    def __new__(cls, value: float, read: str = "", rule: str = "") -> Judgement:
        judgement = super().__new__(cls, value)
        judgement.read, judgement.rule = read, rule
        return judgement


Reward = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Outcome:
    """One rule's verdict on one item: a value, or the reason why there is none."""

    value: float | None
    failure: str | None = None
    read: str = ""  # what the rule took as the answer
    rule: str = ""  # what decided, for example "number" or "no box, or several"
    seconds: float = 0.0  # of judging, in the sandbox


@dataclass(frozen=True)
class Score:
    """The weighted verdict of a task's rules on one response. `value` is None if any rule failed."""

    value: float | None
    parts: dict[str, float | None] = field(default_factory=dict)
    failure: str | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # per rule: what was read and what decided
    seconds: float = 0.0  # of judging, in the sandbox


def outcomes_of(values: Sequence[Any], rule: str, count: int | None = None) -> list[Outcome]:
    """Check a rule's answers, one for each of `count` items. What is no number in [0, 1] (None, a string, an array of two)
    becomes a failure that says so; numbers of numpy and torch are numbers. Raises InputError for another number of answers."""
    wanted = "for each item" if count is None else f"for each of the {count} items"
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise InputError(f"reward {rule!r} returned {type(values).__name__}; it must return a list with one number or None {wanted}")
    if count is not None and len(values) != count:
        raise InputError(f"reward {rule!r} returned {len(values)} values; it must return one {wanted}, None where it cannot judge")
    return [_outcome(value, rule) for value in values]


def _outcome(value: Any, rule: str) -> Outcome:
    if value is None:
        return Outcome(None, f"{rule}: could not judge; is the solution one that this rule reads?")
    number = plain_value(value)
    if number is None:
        return Outcome(None, f"{rule}: {str(value)[:60]!r} ({type(value).__name__}) is no number")
    if not 0.0 <= number <= 1.0:  # also true for NaN
        return Outcome(None, f"{rule}: value {number!r} is outside [0, 1]")
    return Outcome(number, None, getattr(value, "read", ""), getattr(value, "rule", ""))


def plain_value(value: Any) -> float | None:
    """A number, or an array of one number, as a float; None for text, None, several numbers and everything else."""
    if isinstance(value, str | bytes | bytearray | dict | list | tuple):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
