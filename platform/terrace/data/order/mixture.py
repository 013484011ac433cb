"""The mixture: which source gives the n-th sample of a stage, exact over every prefix, and computed from n.

Weights become whole numbers (0.7 and 0.3 are 7 and 3), so the interleave repeats with period 7 + 3. Within a period
every pick of a source has a window in which it must fall for the counts to stay within one sample of n times its
share, and the earliest deadline goes first: the schedule known as Pfair, which always exists. After n samples every
source stands strictly within one sample of its share, where drawing at random would be off by the square root of n.
A period of more than `LONGEST_WRITTEN` picks (weights of seven decimals) is not written out: long_period.py computes it.

A source whose epoch cap is reached drops out and the others go on in their proportions: a new phase of the interleave.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from terrace.data.order.long_period import LongPeriod

LONGEST_WRITTEN = 1_000_000  # picks of a period that is written out: two seconds at most
ROUNDED_PERIOD = 100_000  # parts into which computed weights (temperature, token unit) are rounded
STRIDE = 4096  # prefix counts are kept at every so many picks


def whole_weights(weights: Mapping[str, float | Fraction]) -> dict[str, int]:
    """Weights as the smallest whole numbers in the same proportion, read from their decimal notation.

    0.1 means one tenth, not the nearest binary fraction; nothing is rounded.
    """
    exact = {name: w if isinstance(w, Fraction) else Fraction(repr(float(w))) for name, w in weights.items()}
    scale = lcm(*(fraction.denominator for fraction in exact.values()))
    whole = {name: int(fraction * scale) for name, fraction in exact.items()}
    divisor = gcd(*whole.values())
    return {name: value // divisor for name, value in whole.items()}


def rounded_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """Computed weights as whole parts of about `ROUNDED_PERIOD`, at least one each."""
    total = sum(weights.values())
    whole = {name: max(1, round(value / total * ROUNDED_PERIOD)) for name, value in weights.items()}
    divisor = gcd(*whole.values())
    return {name: value // divisor for name, value in whole.items()}


class Period:
    """One period of the interleave of whole weights, extended as far as it is asked for."""

    def __init__(self, weights: tuple[int, ...]):
        self.weights = np.asarray(weights, dtype=np.int64)
        self.length = int(self.weights.sum())
        self._picks = np.empty(0, dtype=np.int16)
        self._prefix = [np.zeros(len(weights), dtype=np.int64)]  # counts after k * STRIDE picks
        # (release, deadline, source, number) of each source's next pick; a pick may fall in slots [release, deadline)
        self._waiting = [self._window(source, 1) for source in range(len(weights))]
        self._released: list[tuple[int, int, int]] = []
        heapq.heapify(self._waiting)

    def _window(self, source: int, number: int) -> tuple[int, int, int, int]:
        weight = int(self.weights[source])
        return (number - 1) * self.length // weight, -(-number * self.length // weight), source, number

    def picks(self, stop: int) -> np.ndarray:
        """Sources of the first `stop` picks of the period, or more: int16."""
        if stop > len(self._picks):
            target = min(self.length, max(stop, 2 * len(self._picks), STRIDE))
            fresh = np.empty(target - len(self._picks), dtype=np.int16)
            waiting, released = self._waiting, self._released
            start = len(self._picks)
            for slot in range(start, target):
                while waiting and waiting[0][0] <= slot:
                    _, deadline, source, number = heapq.heappop(waiting)
                    heapq.heappush(released, (deadline, source, number))
                _, source, number = heapq.heappop(released)
                fresh[slot - start] = source
                heapq.heappush(waiting, self._window(source, number + 1))
            self._picks = np.concatenate([self._picks, fresh])
            while len(self._prefix) * STRIDE <= len(self._picks):
                begin = (len(self._prefix) - 1) * STRIDE
                counts = np.bincount(self._picks[begin : begin + STRIDE], minlength=len(self.weights))
                self._prefix.append(self._prefix[-1] + counts)
        return self._picks

    def between(self, start: int, stop: int) -> np.ndarray:
        """Sources of the picks from `start` to `stop` (without it), in any periods: int16."""
        slots = np.arange(start, stop) % self.length
        return self.picks(int(slots.max()) + 1)[slots]

    def counts(self, picks: int) -> np.ndarray:
        """Picks per source among the first `picks` (any number of periods): int64 [sources]."""
        periods, rest = divmod(picks, self.length)
        table = self.picks(rest)
        stride = rest // STRIDE
        tail = np.bincount(table[stride * STRIDE : rest], minlength=len(self.weights))
        return periods * self.weights + self._prefix[stride] + tail

    def slot_of(self, source: int, number: int) -> int:
        """The slot in which `source` is picked for the `number`-th time (from 1)."""
        periods, rest = divmod(number - 1, int(self.weights[source]))
        release, deadline, _, _ = self._window(source, rest + 1)
        table = self.picks(min(deadline, self.length))
        before = int(self.counts(release)[source])
        inside = np.flatnonzero(table[release:deadline] == source)
        return periods * self.length + release + int(inside[rest - before])


@dataclass(frozen=True)
class Phase:
    """A stretch of the stage with the same sources taking part."""

    start: int  # first position
    counts: np.ndarray  # int64 [all sources]: samples given before `start`
    active: np.ndarray  # int64: numbers of the sources that take part
    period: Period | LongPeriod


@dataclass
class Interleave:
    """Position -> (source, how many-th sample of it), for the sources in the order of `names`.

    `limits[i]` is the most samples source i gives (its epoch cap), or None. `total` is their sum, or None. A weight of 0 gives none.
    """

    names: list[str]
    weights: dict[str, int]
    limits: list[int | None]
    total: int | None = None
    given: Sequence[int] | None = None  # samples of each source before position 0 (a stretch of a stage after another)
    _phases: list[Phase] = field(default_factory=list)

    def __post_init__(self) -> None:
        if all(limit is not None for limit in self.limits):
            self.total = sum(limit for limit in self.limits if limit is not None)
        before = np.zeros(len(self.names), dtype=np.int64) if self.given is None else np.asarray(self.given, dtype=np.int64)
        self._phases.append(self._phase(0, before))

    def _phase(self, start: int, counts: np.ndarray) -> Phase:
        left = [
            self.weights[name] > 0 and (limit is None or counts[number] < limit)
            for number, (name, limit) in enumerate(zip(self.names, self.limits))
        ]
        active = np.flatnonzero(left)
        whole = [self.weights[self.names[number]] for number in active]
        divisor = gcd(*whole) if whole else 1
        period = LongPeriod if sum(whole) // divisor > LONGEST_WRITTEN else Period
        return Phase(start, counts, active, period(tuple(weight // divisor for weight in whole)))

    def _end(self, phase: Phase) -> int | None:
        """The position after which a source of the phase has given all it may; None: never."""
        ends = []
        for place, number in enumerate(phase.active):
            limit = self.limits[number]
            if limit is not None:
                ends.append(phase.start + phase.period.slot_of(place, limit - int(phase.counts[number])) + 1)
        return min(ends, default=None)

    def _phase_at(self, position: int) -> tuple[Phase, int | None]:
        """The phase that holds a position, and where it ends."""
        number = 0
        while True:
            phase = self._phases[number]
            if not phase.active.size:
                return phase, None
            if number + 1 < len(self._phases):
                end: int | None = self._phases[number + 1].start
            else:
                end = self._end(phase)
                if end is not None and end <= position:
                    self._phases.append(self._phase(end, self._counts_in(phase, end)))
            if end is None or position < end:
                return phase, end
            number += 1

    def _counts_in(self, phase: Phase, position: int) -> np.ndarray:
        counts = phase.counts.copy()
        if phase.active.size:
            counts[phase.active] += phase.period.counts(position - phase.start)
        return counts

    def counts(self, position: int) -> np.ndarray:
        """Samples per source before a position: int64 [sources]."""
        phase, _ = self._phase_at(position)
        return self._counts_in(phase, position)

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources (int16) and their draw numbers (int64, from 0) at positions [start, stop); fewer at the very end."""
        sources, draws = [], []
        while start < stop:
            phase, end = self._phase_at(start)
            if not phase.active.size:
                break
            upto = stop if end is None else min(stop, end)
            local = phase.period.between(start - phase.start, upto - phase.start)
            counts = self._counts_in(phase, start)
            numbers = np.empty(len(local), dtype=np.int64)
            for place, number in enumerate(phase.active):
                inside = local == place
                numbers[inside] = counts[number] + np.arange(int(inside.sum()))
            sources.append(phase.active[local].astype(np.int16))
            draws.append(numbers)
            start = upto
        if not sources:
            return np.empty(0, dtype=np.int16), np.empty(0, dtype=np.int64)
        return np.concatenate(sources), np.concatenate(draws)
