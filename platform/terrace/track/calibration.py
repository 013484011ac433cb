"""A stage's judgements for a person to audit: some of each task at random, with what was read, what decided, and the picture.

Pure. The sample is a reservoir, so that it is fair over a stage of any length and needs no more memory than what is shown, and
its random numbers come from the seed and the task alone: a resumed stage that is shown the same judgements keeps the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN_PER_TASK = 20
SHOWN_CHARACTERS = 1_200  # of a response: its beginning and its end


@dataclass(frozen=True)
class Shown:
    """One judgement. `reasons` are those of `Score`: per rule what was read as the answer and what decided."""

    task: str
    prompt_id: str
    prompt: str
    response: str
    solution: Any
    value: float | None
    failure: str | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    iteration: int = 0
    seen: str = ""  # under which name the pictures stand that an environment showed within the response; empty: none


@dataclass
class Calibration:
    """The sample so far. `seen` counts all judgements of a task."""

    seed: int
    shown: dict[str, list[Shown]] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def add(self, judgements: Iterable[Shown]) -> None:
        """Show each with the chance that makes all judgements so far equally likely to be in the sample."""
        for judgement in judgements:
            place = self.place_for_next(judgement.task)
            if place is not None:
                self.put(place, judgement)

    def place_for_next(self, task: str) -> int | None:
        """Where the task's next judgement goes, which is counted as seen; None: it is not shown. No judgement is needed to know."""
        number = self.seen.get(task, 0)
        self.seen[task] = number + 1
        if number < SHOWN_PER_TASK:
            return number
        digest = hashlib.sha256(f"{self.seed}/{task}/{number}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "big") % (number + 1)
        return drawn if drawn < SHOWN_PER_TASK else None

    def put(self, place: int, judgement: Shown) -> None:
        """Show a judgement at its place; those of one task that are new come in the order of their places."""
        kept = self.shown.setdefault(judgement.task, [])
        kept[place : place + 1] = [judgement]

    def state(self) -> dict[str, Any]:
        """Plain JSON values, for a checkpoint."""
        return {
            "seed": self.seed,
            "seen": dict(self.seen),
            "shown": {task: [asdict(one) for one in kept] for task, kept in self.shown.items()},
        }


def calibration_from(state: Mapping[str, Any]) -> Calibration:
    """The sample of an earlier `state()`."""
    shown = {task: [Shown(**one) for one in kept] for task, kept in state["shown"].items()}
    return Calibration(state["seed"], shown, dict(state["seen"]))


def shortened(text: str) -> str:
    """Its beginning and its end, at most about SHOWN_CHARACTERS; shortening again changes nothing."""
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
