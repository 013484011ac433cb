"""Generation that goes on while the policy trains (`overlap`): the stream of groups stays open from one iteration to the next.

What trains is decided as in `seamless`: the first `prompts_per_iteration` groups in the order of the draw that teach something, once
all before them are judged. What was begun after them is kept. Every token carries the number of the weights that sampled it (the
iterations that were trained before); a group with a token older than `max_staleness` iterations is dropped and counted. No more groups
are begun than the iterations need that can still train what these weights sample: max_staleness + 1 while the policy waits, one fewer
while it trains. So few are too old.

A checkpoint keeps what is judged and not decided, and the place in the order behind what is decided. What was still decoding then is
begun again with the same draws. So every draw has exactly one fate, which `rl.ledger` writes down.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.order.permutation import seed_of
from terrace.generation.interface import Response
from terrace.rl.collect import Collected, Group
from terrace.rl.draws import Draws
from terrace.rl.dynamic_sampling import Selection, select_groups
from terrace.rl.prompts import Drawn
from terrace.rl.seamless import Collection, Known, SeamlessCollector, stored_rewards
from terrace.rl.stored import StoredReward, rollout_bytes, rollout_from
from terrace.rl.stream import Answered, Stream
from terrace.worker.collectives import gather_objects


@dataclass(frozen=True)
class Waiting:
    """A judged group that is not decided, as a checkpoint keeps it."""

    drawn: Drawn
    responses: list[Response]
    rewards: list[StoredReward]

    @property
    def number(self) -> int:
        return self.drawn.occurrence


@dataclass
class Ahead:
    """How many groups of this rank are begun or wait, as far as they may train. Both threads count."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    begun: int = 0
    useless: int = 0  # answered, and nothing to learn from
    decided: int = 0  # could have trained, and are decided
    stale: int = 0  # could train, were they not too old
    allowed: int = 0

    def may_begin(self) -> bool:
        with self.lock:
            return self.begun - self.useless - self.decided - self.stale < self.allowed


class OverlappedCollector(SeamlessCollector):
    """See `collect.Collector`."""

    _collection: Collection | None = None
    _version = 0
    _extra = 0

    def __init__(self, **what: Any) -> None:
        super().__init__(**what)
        assert self.options.overlap is not None
        self._most_stale = self.options.overlap.max_staleness
        self._known = Known()
        self._ahead = Ahead()
        self._restored: list[Waiting] = []

    def collect(self, iteration: int, folder: Path, doing: Callable[[str], None]) -> Collected:
        self._version, self._extra = iteration, 0
        self._allow(iteration)
        if self._collection is None:
            self._open(doing)
        collection, known = self._collection, self._known
        assert collection is not None
        started = time.time()
        self._gather(collection, known, iteration, lambda: self._useful(known), doing)
        selection, end = self._chosen(known)
        self.new_prompts = {drawn: prompt for drawn, prompt in collection.prompts.items() if drawn.occurrence < end}
        collected = self._collected(known, selection, end, time.time() - started)
        collected.draws, collected.overlapped = (collection.base, end), True
        collected.stale = [known.groups[number] for number in known.prefix() if number < end and not self._fresh(known.groups[number])]
        collected.waiting = len(known.groups) - len(collected.groups) - len(collected.stale)
        self._decide(collection, known, end)
        return collected

    def close(self) -> None:
        if self._collection is not None:
            self._collection.stream.close()
            self._collection = None

    # ------------------------------------------------------------ the stream

    def _open(self, doing: Callable[[str], None]) -> None:
        waiting = {one.number: one for one in self._restored}
        draws = Draws(self.order, self.reader, self.context, None, self._ahead.may_begin, waiting)
        self._known.to = draws.first
        self.order.settle(self.order.mark())
        own = [one for one in self._restored if draws.mine(one.number)]
        doing("reading the prompts of")
        prompts = self.reader.read([one.drawn for one in own])
        mine = {one.number: self._group(one.drawn, prompt, one.responses, one.rewards) for one, prompt in zip(own, prompts)}
        self._ahead.begun += len(mine)
        for group in mine.values():
            self._count(group.rewards)
        stream = Stream(self.engine, self._sampling(seed_of(self.seed, "rollout")), self._counted(draws), self._submit, self._answered)
        self._collection = Collection(draws, stream, draws.first, mine, prompts=dict(zip([one.drawn for one in own], prompts)))
        self._restored = []

    def _counted(self, draws: Draws) -> Any:
        for begun in draws:
            if begun is not None:
                with self._ahead.lock:
                    self._ahead.begun += 1
            yield begun

    def _answered(self, answered: Answered) -> None:
        self._count(answered.rewards)

    def _count(self, rewards: np.ndarray) -> None:
        if not self._teaches(rewards):
            with self._ahead.lock:
                self._ahead.useless += 1

    def _allow(self, next_iteration: int) -> None:
        """As many groups as can train from `next_iteration` on, while what these weights sample is not too old and the stage goes on."""
        last = min(self._version + self._most_stale, self.order.iterations - 1)
        share = -(-self.options.prompts_per_iteration * max(0, last - next_iteration + 1) // self.context.world_size)
        with self._ahead.lock:
            self._ahead.allowed = share + self._extra

    def _of_mine(self, collection: Collection) -> int:
        with self._ahead.lock:
            self._ahead.stale = sum(
                self._teaches(group.rewards) and not self._fresh(group) for group in list(collection.mine.values())
            )
        to = collection.reached()
        return sum(
            self._teaches(group.rewards) and self._fresh(group) for number, group in collection.mine.items() if number < to
        )

    def _exchange_known(self, collection: Collection, known: Known) -> None:
        super()._exchange_known(collection, known)
        missing = self.options.prompts_per_iteration - self._useful(known)
        if missing > 0:  # this rank's share was not enough, or another's
            self._extra += -(-missing // self.context.world_size)
            self._allow(self._version)

    # ------------------------------------------------------------ what is chosen

    def _teaches(self, rewards: np.ndarray) -> bool:
        return bool(select_groups([rewards], 1, self.options.dynamic_sampling).kept)

    def _fresh(self, group: Group) -> bool:
        return self._version - group.ages[0] <= self._most_stale

    def _limit(self, known: Known) -> int:
        """Behind the last draw that this iteration may look at."""
        assert self._collection is not None
        rounds = self.options.max_sampling_rounds if self.options.dynamic_sampling else 1
        return min(known.to, self._collection.base + self.options.prompts_per_iteration * rounds)

    def _useful(self, known: Known) -> int:
        """Groups that may train; enough where no further draw may be looked at."""
        assert self._collection is not None
        limit = self._limit(known)
        if limit < known.to:
            return self.options.prompts_per_iteration
        return sum(self._teaches(known.groups[number].rewards) and self._fresh(known.groups[number]) for number in known.prefix())

    def _chosen(self, known: Known) -> tuple[Selection, int]:
        wanted, limit = self.options.prompts_per_iteration, self._limit(known)
        numbers = [number for number in known.prefix() if number < limit and self._fresh(known.groups[number])]
        selection = select_groups([known.groups[number].rewards for number in numbers], wanted, self.options.dynamic_sampling)
        end = numbers[selection.kept[-1]] + 1 if selection.missing <= 0 else limit
        within = [known.groups[number].rewards for number in numbers if number < end]
        return select_groups(within, wanted, self.options.dynamic_sampling), end

    def _decided_groups(self, known: Known, end: int) -> list[Group]:
        return [group for group in super()._decided_groups(known, end) if self._fresh(group)]

    def _decide(self, collection: Collection, known: Known, end: int) -> None:
        """Everything before draw `end` has its fate. What begins now, before there are other weights, trains in the next iteration at the
        earliest."""
        self._extra = 0
        self._allow(self._version + 1)
        self.order.settle(collection.draws.marks[end])
        done = [group for number, group in collection.mine.items() if number < end]
        with self._ahead.lock:
            useful = sum(self._teaches(group.rewards) for group in done)
            self._ahead.decided += useful
            self._ahead.useless -= len(done) - useful  # both leave the count
            self._ahead.begun -= len(done) - useful
            self._ahead.stale = 0  # counted again before the next wait
        for held in (known.groups, known.unready, known.damaged, collection.mine):
            for number in [number for number in list(held) if number < end]:
                del held[number]
        collection.told = {number for number in collection.told if number >= end}
        collection.prompts = {drawn: prompt for drawn, prompt in collection.prompts.items() if drawn.occurrence >= end}
        collection.draws.forget(end)
        collection.base = end

    # ------------------------------------------------------------ what a checkpoint keeps

    def state(self) -> bytes:
        """The groups of all ranks that are judged and not decided. Every rank calls it."""
        waiting = list(self._restored)
        if self._collection is not None:
            self._take(self._collection, self._collection.stream.taken(lambda: None, 0))
            groups = [self._collection.mine[number] for number in sorted(self._collection.mine)]
            waiting = [Waiting(group.drawn, list(group.responses), stored_rewards(group)) for group in groups]
            waiting = [one for hand in gather_objects(waiting, self.context) for one in hand]
        said = {
            "draws": [[*one.drawn.key, one.number] for one in waiting], "rewards": [[list(two) for two in one.rewards] for one in waiting]
        }  # fmt: skip
        return rollout_bytes(said, [one.responses for one in waiting])

    def restore(self, state: bytes) -> None:
        """Go on from `state`."""
        identity, groups = rollout_from(state)
        said = json.loads(identity)
        self._restored = [
            Waiting(Drawn((source, int(row)), int(number)), responses, [(value, why, read) for value, why, read in rewards])
            for (source, row, number), responses, rewards in zip(said["draws"], groups, said["rewards"])
        ]

