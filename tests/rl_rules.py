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
    """Never judges."""
    return [None] * len(items)


def sometimes_failing(items: list[RewardItem]) -> list[float | None]:
    """Judges the share of digits, but not in responses of an odd length."""
    return [value if len(item.response) % 2 == 0 else None for item, value in zip(items, share_of_digits(items))]


def always_one(items: list[RewardItem]) -> list[float | None]:
    """Whatever is said is right."""
    return [1.0] * len(items)
