"""An iteration without rounds (`rollout: seamless`): groups begin one after another, and end when enough of them teach something.

The next prompt begins wherever a place is free, rewards are computed while others decode, and nobody waits for the end of a round.
What trains is decided first in, first out: the first `prompts_per_iteration` groups in the order of the draw that teach something, and
only once every group begun before the last of them is judged, so that short answers are not preferred (MiMo-7B, section 3.4). What
was begun after it is given up, its prompts are drawn again in the next iteration, and the policy stays strictly on-policy.

The choice follows from the order and the rewards alone, never from who was ready first. With several ranks each decodes its draws and
exchanges groups as soon as its share is there; all see the same groups in the same order, so all choose the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from terrace.data.order.permutation import seed_of
from terrace.generation.interface import Prompt, Sampling
from terrace.rl.collect import Collected, Collector, Group, reward_values
from terrace.rl.draws import Draws
from terrace.rl.dynamic_sampling import Selection, select_groups
from terrace.rl.exchange import told
from terrace.rl.prompts import Drawn
from terrace.rl.stored import StoredReward, load_rewards, load_rollout, save_rewards, save_rollout, stored_identity
from terrace.rl.stream import Answered, Stream
from terrace.worker.collectives import gather_objects


@dataclass
class Known:
    """Groups by the number of their draw, as all ranks know them; `to`: every draw before it is judged or cannot be."""

    groups: dict[int, Group] = field(default_factory=dict)
    unready: dict[int, str] = field(default_factory=dict)
    damaged: dict[int, str] = field(default_factory=dict)
    to: int = 0
    over: bool = False  # nothing more will come, on any rank

    def prefix(self) -> list[int]:
        return sorted(number for number in self.groups if number < self.to)


@dataclass
class Collection:
    """A stream with the draws that it answers, and what of it the other ranks do not know yet."""

    draws: Draws
    stream: Stream
    base: int  # the first draw that is not decided
    mine: dict[int, Group] = field(default_factory=dict)  # this rank's judged groups that are not decided
    told: set[int] = field(default_factory=set)  # of those, the ones that were exchanged
    prompts: dict[Drawn, Prompt] = field(default_factory=dict)

    def reached(self) -> int:
        """Every draw of this rank before this number is judged or cannot be."""
        number = self.base
        while number < self.draws.begun_to:
            done = number in self.mine or number in self.draws.unready or number in self.draws.damaged
            if self.draws.mine(number) and not done:
                break
            number += 1
        return number


class SeamlessCollector(Collector):
    """See `collect.Collector`."""

    def collect(self, iteration: int, folder: Path, doing: Callable[[str], None]) -> Collected:
        started = time.time()
        begin = self.order.mark()
        known = self._from_disk(iteration, folder, doing)
        if known is None:
            known = self._generated(iteration, doing, begin, folder)
        selection, end = self._chosen(known)
        collected = self._collected(known, selection, end, time.time() - started)
        collected.draws = (begin[1], end)
        return collected

    def _generated(self, iteration: int, doing: Callable[[str], None], begin: tuple[int, int], folder: Path) -> Known:
        options = self.options
        most = options.prompts_per_iteration * (options.max_sampling_rounds if options.dynamic_sampling else 1)
        draws = Draws(self.order, self.reader, self.context, begin[1] + most)
        sampling = self._sampling(seed_of(self.seed, "rollout"))
        collection = Collection(draws, Stream(self.engine, sampling, iter(draws), self._submit), begin[1])
        known = Known(to=begin[1])
        try:
            self._gather(collection, known, iteration, lambda: len(select_groups(
                [known.groups[number].rewards for number in known.prefix()], options.prompts_per_iteration, options.dynamic_sampling
            ).kept), doing)  # fmt: skip
        finally:
            collection.stream.close()
        _, end = self._chosen(known)
        self.order.rewind(draws.marks[end])
        mine = {number: group for number, group in collection.mine.items() if number < end}
        self.new_prompts = {drawn: prompt for drawn, prompt in collection.prompts.items() if drawn.occurrence < end}
        self._to_disk(iteration, folder, begin[1], end, mine, known)
        return known

    def _sampling(self, seed: int) -> Sampling:
        options = self.options
        return Sampling(options.samples_per_prompt, options.max_response_tokens, options.temperature, options.top_p, seed)

    def _gather(
        self, collection: Collection, known: Known, iteration: int, useful: Callable[[], int], doing: Callable[[str], None]
    ) -> None:
        """Exchange groups until `prompts_per_iteration` of the known ones are `useful`, or no more come."""
        wanted, ranks = self.options.prompts_per_iteration, self.context.world_size
        share = -(-wanted // ranks)
        while True:
            doing("decoding the rollouts of")
            self._wait_for(collection, share, lambda: doing("decoding the rollouts of"))
            doing("exchanging the groups of all ranks of")
            self._exchange_known(collection, known)
            self._check_failures(list(known.groups.values()), iteration)
            missing = wanted - useful()
            if missing <= 0 or known.over:
                return
            share = self._of_mine(collection) + max(1, -(-missing // ranks))

    def _of_mine(self, collection: Collection) -> int:
        """How many of this rank's groups in its prefix teach something."""
        to = collection.reached()
        rewards = [group.rewards for number, group in collection.mine.items() if number < to]
        return len(select_groups(rewards, len(rewards), self.options.dynamic_sampling).kept)

    def _wait_for(self, collection: Collection, share: int, tick: Callable[[], None]) -> None:
        """Until `share` groups of this rank teach something, or all is answered."""
        while self._of_mine(collection) < share and not collection.stream.over:
            self._take(collection, collection.stream.taken(tick))
        self._take(collection, collection.stream.taken(tick, 0))

    def _take(self, collection: Collection, answered: list[Answered]) -> None:
        for one in answered:
            begun = one.begun
            collection.mine[begun.number] = self._group(begun.drawn, begun.prompt, one.responses, reward_values(one.scores))
            collection.prompts[begun.drawn] = begun.prompt

    def _exchange_known(self, collection: Collection, known: Known) -> None:
        new = {number: group for number, group in collection.mine.items() if number not in collection.told}
        collection.told |= new.keys()
        draws = collection.draws
        outlines = {number: told(group) for number, group in new.items()}
        own = (outlines, dict(draws.unready), dict(draws.damaged), collection.reached(), collection.stream.over)
        hands: list[Any] = gather_objects(own, self.context)
        for groups, unready, damaged, _, _ in hands:
            known.groups |= groups
            known.unready |= unready
            known.damaged |= damaged
        known.groups |= new  # its own with words
        known.to = min(hand[3] for hand in hands)
        known.over = all(hand[4] for hand in hands)

    # ------------------------------------------------------------ what is chosen

    def _chosen(self, known: Known) -> tuple[Selection, int]:
        """Which of the prefix train (places in it), and the number behind the last draw that is decided."""
        numbers, wanted = known.prefix(), self.options.prompts_per_iteration
        selection = select_groups([known.groups[number].rewards for number in numbers], wanted, self.options.dynamic_sampling)
        end = numbers[selection.kept[-1]] + 1 if selection.missing <= 0 else known.to
        within = [number for number in numbers if number < end]
        return select_groups([known.groups[number].rewards for number in within], wanted, self.options.dynamic_sampling), end

    def _collected(self, known: Known, selection: Selection, end: int, seconds: float) -> Collected:
        groups = self._decided_groups(known, end)
        damaged = [number for number in sorted(known.damaged) if number < end]
        unready = [number for number in sorted(known.unready) if number < end]
        return Collected(
            groups=groups,
            selection=selection,
            rounds=1 if groups else 0,
            rollout_seconds=seconds,
            reward_seconds=0.0,
            prompts=self.new_prompts,
            damaged=[known.damaged[number] for number in damaged],
            unready=[known.unready[number] for number in unready],
            damaged_draws=damaged,
            unready_draws=unready,
        )

    def _decided_groups(self, known: Known, end: int) -> list[Group]:
        return [known.groups[number] for number in known.prefix() if number < end]

    # ------------------------------------------------------------ what is kept on disk

    def _files(self, folder: Path) -> tuple[Path, Path]:
        return folder / f"seamless-{self.context.rank}.npz", folder / f"seamless-rewards-{self.context.rank}.json"

    def _identity(self, iteration: int, begin: int, end: int, mine: Mapping[int, Drawn], damaged: Mapping[int, str]) -> dict[str, Any]:
        context = self.context
        return {
            "stage": self.stage_hash, "iteration": iteration, "rank": context.rank, "world_size": context.world_size,
            "draws": [begin, end], "prompts": [[*mine[number].key, number] for number in sorted(mine)],
            "damaged": {str(number): name for number, name in damaged.items() if number < end},
        }  # fmt: skip

    def _to_disk(self, iteration: int, folder: Path, begin: int, end: int, mine: Mapping[int, Group], known: Known) -> None:
        identity = self._identity(iteration, begin, end, {number: group.drawn for number, group in mine.items()}, known.damaged)
        rollouts, rewards = self._files(folder)
        groups = [mine[number] for number in sorted(mine)]
        save_rollout(rollouts, identity, [group.responses for group in groups])
        save_rewards(rewards, identity, [stored_rewards(group) for group in groups])

    def _from_disk(self, iteration: int, folder: Path, doing: Callable[[str], None]) -> Known | None:
        """What all ranks have kept of this iteration; None, and the order as it was, where one has not."""
        rollouts, rewards = self._files(folder)
        said = stored_identity(rollouts) or {}
        begin = self.order.mark()
        ends = gather_objects(said.get("draws"), self.context)
        if any(one is None or one != ends[0] or one[0] != begin[1] for one in ends):
            return None
        draws = Draws(self.order, self.reader, self.context, ends[0][1])
        while draws.draw() is not None:
            pass
        damaged = {int(number): name for number, name in said["damaged"].items()}
        listed = {number: drawn for number, drawn in draws.names.items() if draws.mine(number) and number not in damaged}
        usable, unready = self.reader.without_unready(list(listed.values()))
        mine = {drawn.occurrence: drawn for drawn in usable}
        identity = self._identity(iteration, begin[1], ends[0][1], mine, damaged)
        groups, scores = load_rollout(rollouts, identity), load_rewards(rewards, identity)
        if not all(gather_objects(groups is not None and scores is not None, self.context)):
            self.order.rewind(begin)
            return None
        doing("reading the prompts of")
        prompts = self.reader.read(usable)
        self.new_prompts = dict(zip(usable, prompts))
        own = {
            drawn.occurrence: self._group(drawn, *three) for drawn, *three in zip(usable, prompts, groups or (), scores or ())
        }  # fmt: skip
        left_out = {drawn.occurrence: name for drawn, name in zip([d for d in listed.values() if d not in usable], unready)}
        known = Known(to=ends[0][1], over=True, damaged=damaged)
        for hand in gather_objects(({number: told(group) for number, group in own.items()}, left_out), self.context):
            known.groups |= hand[0]
            known.unready |= hand[1]
        known.groups |= own
        return known


def stored_rewards(group: Group) -> list[StoredReward]:
    """The group's rewards as they are kept on disk."""
    failures = iter(group.failures)
    reasons = group.reasons or ({},) * len(group.rewards)
    return [
        (None, next(failures), why) if value != value else (value, None, why) for value, why in zip(group.rewards.tolist(), reasons)
    ]
