"""Rewards that a tiny model can raise. A module of its own: the sandbox imports it in every process."""

from __future__ import annotations

from terrace.rewards.types import RewardItem


def share_of_digits(items: list[RewardItem]) -> list[float | None]:
    """The share of a response's characters that are digits."""
    return [sum(char.isdigit() for char in item.response) / max(len(item.response), 1) for item in items]


def share_of_capitals(items: list[RewardItem]) -> list[float | None]:
    """The share of a response's characters that are capital letters."""
    return [sum(char.isupper() for char in item.response) / max(len(item.response), 1) for item in items]


def failing(items: list[RewardItem]) -> list[float | None]:
    """Judges the solution itself, as it is asked before a stage, and no other response."""
    return [1.0 if item.response == str(item.solution) else None for item in items]


def sometimes_failing(items: list[RewardItem]) -> list[float | None]:
    """Judges the share of digits, but not in responses of an odd length, the solution itself aside."""
    judged = [len(item.response) % 2 == 0 or item.response == str(item.solution) for item in items]
    return [value if one else None for one, value in zip(judged, share_of_digits(items))]


def always_one(items: list[RewardItem]) -> list[float | None]:
    """Whatever is said is right."""
    return [1.0] * len(items)
