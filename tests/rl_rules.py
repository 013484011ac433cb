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


def more_digits(conversation, response, state, *, turns=3):
    """An environment: shows an answer's share of digits as a grey picture, pays a third of it, and ends after some turns."""
    import numpy as np

    share = sum(char.isdigit() for char in response) / max(len(response), 1)
    state["shares"] = [*state.get("shares", []), share]
    if state["turn"] != len(state["shares"]) or len(conversation) != 2 * state["turn"]:
        raise ValueError("the state is not the one that was left")
    if len(state["metadata"]["image_sizes"]) != state["turn"]:
        raise ValueError("an image is missing")
    grey = np.full((30 + 2 * state["turn"], 40, 3), int(255 * share), np.uint8)
    said = [grey, f"{state['solution']}: more digits, 0123456789"]
    return {"observation": said, "reward": share / 3, "done": state["turn"] == turns}


def ends_in_silence(conversation, response, state):
    """An environment that never names a reward."""
    return {"observation": "go on", "done": state["turn"] == 2}


def wrong_environment(conversation, response, state, *, how="text"):
    """An environment that does not keep to what is asked of it, from its first answer or from its second."""
    from terrace.rewards.environment import Step

    answers = {
        "text": lambda: "go on", "nothing": lambda: Step(), "reward": lambda: Step("go on", reward=1.5), "endless": _endless,
        "picture": lambda: Step([b"no picture"]), "raise": lambda: 1 / 0, "object": lambda: Step([object()]),
        "long": lambda: Step("word " * 400),
        "state": lambda: (state.update(kept=object()), Step("go on"))[1],
    }  # fmt: skip
    return answers[how]()


def _endless():
    while True:
        pass
