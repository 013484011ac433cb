"""What ranks tell each other of their groups: numbers to all, and responses to the one rank that trains them.

A group of 16 responses of 4,096 tokens is half a megabyte with its log-probabilities and texts, and more with the pictures of an
environment; what selection, advantages, balance and metrics ask of it is under two kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from terrace.generation.interface import Response
from terrace.worker.collectives import exchange_objects
from terrace.worker.context import WorkerContext


class Shared(Protocol):
    """What is asked of a group (rl.collect.Group)."""

    responses: tuple[Response, ...]

    @property
    def whole(self) -> bool: ...


Group = TypeVar("Group", bound=Shared)


@dataclass(frozen=True)
class Outline:
    """A response as ranks know it that did not sample it: the numbers of generation.interface.Response under the same names."""

    length: int
    sampled: int
    longest_answer: int
    finished: bool
    turns: int | None
    visual_tokens: int

    @property
    def tokens(self) -> range:
        """As many as there are, without their values."""
        return range(self.length)

    @property
    def sampled_tokens(self) -> range:
        return range(self.sampled)


def outline(response: Response | Outline) -> Outline:
    if isinstance(response, Outline):
        return response
    return Outline(
        len(response.tokens), len(response.sampled_tokens), response.longest_answer, response.finished, response.turns,
        response.visual_tokens,
    )  # fmt: skip


def told(group: Group) -> Group:
    """The group as other ranks know it: no tokens, no texts."""
    return replace(group, responses=tuple(map(outline, group.responses)), texts=(), question="", solution="", reasons=())


def delivered(part: Sequence[Group], owners: Sequence[int], context: WorkerContext) -> list[Group]:
    """The groups that this rank trains, in order, with their responses. `owners`: the rank of each group of `part`. All ranks call it."""
    parcels: list[list[tuple[int, tuple[Response, ...]]]] = [[] for _ in range(context.world_size)]
    for place, (group, owner) in enumerate(zip(part, owners)):
        if group.whole:
            parcels[owner].append((place, group.responses))
    arrived = dict(one for parcel in exchange_objects(parcels, context) for one in parcel)
    return [replace(group, responses=arrived[place]) for place, group in enumerate(part) if owners[place] == context.rank]
