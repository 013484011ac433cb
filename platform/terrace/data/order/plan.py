"""The plan of a stage: step -> the packs of its global batch, the same for any number of workers.

Samples come in the order of `mixture` and `order`; a window of about 2,000 of them is packed together, each pack a draw
of the whole window and the packs spread over it (`arrange`); packs [step * batch, (step + 1) * batch) form a step.
Nothing is materialised: the plan keeps three numbers per window it has passed, and a handful of packed windows. Planning
costs 9 microseconds per sample, a two hundredth of decoding one.

Where a window starts depends on the windows before it, so reaching step n walks through them. `restore(state)` with the
state of a checkpoint (a few integers) starts at once anywhere in a stage of any size. The packs of a budget in samples or
epochs are counted once, by planning all of them; the number is part of the state from then on.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from terrace.data.order.arrange import repeats_apart, spread_packs
from terrace.data.order.balance import CostModel, cost_of, deal, deal_in_order, max_over_mean
from terrace.data.order.eligible import Fitting, told_changes
from terrace.data.order.items import EligibleSource, StageSource
from terrace.data.order.mixture import LONGEST_WRITTEN
from terrace.data.order.packing import default_window, lookahead, pack_window
from terrace.data.order.permutation import seed_of
from terrace.data.order.spares import PackSpares, spares_of_pack
from terrace.data.order.stored import stored_source
from terrace.data.order.stretches import COLUMNS, Stretch, make_stretches
from terrace.data.types import PackSpec, SampleRef
from terrace.errors import InputError
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.stretches import stretches

CACHED_WINDOWS = 16
PADDING_WINDOW = -1  # the window of packs without samples that complete the last step


@dataclass(frozen=True)
class Window:
    """One packed window: its packs in their final order, and where the next window starts."""

    number: int
    first_pack: int
    packs: tuple[PackSpec, ...]
    next_position: int


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where a window starts: all that must be known to go on from it."""

    first_pack: int
    window: int
    position: int  # samples of the mixture before it, in its stretch


class StagePlan:
    """The packs of one stage. Made by `StagePlan.build` from a recipe, or from sources directly (tests, planning)."""

    def __init__(
        self, stage: Stage, sources: Mapping[str, StageSource], data_seed: int, costs: CostModel, basis: str = "",
        later: Sequence[Mapping[str, StageSource]] = (),
    ):  # fmt: skip
        """`later`: the sources behind each of the stage's changes, where they differ."""
        self.stage = stage
        self.stretches = make_stretches(stage, [sources, *(later or [sources] * len(stage.changes))])
        self.sources = self.stretches[0].sources
        self.costs = costs
        self.recipe: Recipe | None = None  # None for a plan made from bare sources
        self.stage_index = 0
        self._check_sources()
        self.seed = seed_of("terrace order 2", data_seed, stage.name, stage.seed)
        self.weights = self.stretches[0].weights
        self.interleave = self.stretches[0].begin([0] * len(self.sources))
        self.window_samples = stage.data_loading.window_samples or default_window(stage.sequence_length)
        self.total_samples: int | None = self.interleave.total
        if stage.budget.samples is not None:
            if self.total_samples is not None and self.total_samples < stage.budget.samples:
                raise InputError(
                    f"stage {stage.name}: budget.samples is {stage.budget.samples}, but mixture.epoch_caps allow only"
                    f" {self.total_samples}; raise the caps or lower the budget"
                )
            self.total_samples = stage.budget.samples
        self._anchors = [Anchor(0, 0, 0)]
        self._windows: OrderedDict[int, Window] = OrderedDict()
        self._total_packs: int | None = None
        self._lock = threading.RLock()  # a stream plans ahead in a thread while the loop asks for its state
        self.fingerprint = self._fingerprint(data_seed, basis)
        self._check_caps()

    # ------------------------------------------------------------ making

    @classmethod
    def build(cls, recipe: Recipe, stage_index: int, prepared: Any) -> StagePlan:
        """The plan of a recipe's stage over prepared data (`prepare.PreparedData`)."""
        stage = recipe.stages[stage_index]
        found: dict[tuple[int, int], dict[str, StageSource]] = {}
        for _, part in stretches(stage):
            pixels = (part.pixels.min, part.pixels.max)
            if pixels not in found:
                wanted = Fitting(
                    pixels, stage.sequence_length, stage.data_loading.max_visual_tokens_per_pack, OBJECTIVES[stage.objective].needs_targets
                )
                found[pixels] = {
                    name: stored_source(name, recipe.data.sources[name], prepared.indexes[name], wanted, cls.one_picture)
                    for name in stage.mixture.weights
                }
        first, *later = [found[part.pixels.min, part.pixels.max] for _, part in stretches(stage)]
        basis = "|".join(source.mark for sources in found.values() for source in sources.values() if isinstance(source, EligibleSource))
        plan = cls(stage, first, recipe.data.seed, cost_of(recipe.model), basis, later)
        plan.recipe, plan.stage_index = recipe, stage_index
        return plan

    one_picture = False  # whether this kind of plan can use but samples of exactly one picture

    def _check_sources(self) -> None:
        for source in (source for stretch in self.stretches for source in stretch.sources if stretch.weights[source.name]):
            if source.count == 0:
                changes = told_changes(source.changes) or "it has no samples"
                raise InputError(
                    f"stage {self.stage.name}: source {source.name} has no sample for training at sequence_length"
                    f" {self.stage.sequence_length} ({changes}); check its data, or its too_long policy"
                )

    def _check_caps(self) -> None:
        """Epoch caps must leave enough samples for a budget of steps or tokens."""
        if self.total_samples is None or self._steps_in_closed_form() is None:
            return
        tokens = sum(source.mean_tokens * (limit or 0) for source, limit in zip(self.sources, self.interleave.limits))
        needed = (self._steps_in_closed_form() or 0) * self.stage.batch.packs * self.stage.sequence_length
        if tokens < 0.98 * needed:
            raise InputError(
                f"stage {self.stage.name}: the budget asks for {needed:.3g} tokens, but mixture.epoch_caps leave only"
                f" {tokens:.3g}; raise the caps or lower the budget"
            )

    def _fingerprint(self, data_seed: int, basis: str) -> str:
        """Changes when anything changes that could change a pack."""
        stage = self.stage
        facts = {
            "seed": [data_seed, stage.name, stage.seed],
            "sources": [[source.name, source.count, round(source.mean_tokens, 6)] for source in self.sources],
            "mixture": stage.mixture.model_dump(mode="json"),
            "pixels": [stage.pixels.min, stage.pixels.max],
            "packing": [stage.sequence_length, self.window_samples],
            "visual": stage.data_loading.max_visual_tokens_per_pack,
            "batch": stage.batch.packs,
            "basis": basis,
        }
        if any(sum(stretch.weights.values()) > LONGEST_WRITTEN for stretch in self.stretches):
            facts["period"] = "long"  # computed since, in another order than when it was written out
        if stage.changes:
            facts["changes"] = [change.model_dump(mode="json") for change in stage.changes]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8")).hexdigest()[:16]

    # ------------------------------------------------------------ steps

    def _steps_in_closed_form(self) -> int | None:
        budget, stage = self.stage.budget, self.stage
        if budget.steps is not None:
            return budget.steps
        if budget.tokens is not None:
            return math.ceil(Fraction(budget.tokens) / (stage.batch.packs * stage.sequence_length))
        return None

    @property
    def total_steps(self) -> int:
        """Steps of the stage. A budget of samples or epochs is counted by packing all of it once (6 s per million)."""
        steps = self._steps_in_closed_form()
        return steps if steps is not None else max(1, math.ceil(self.total_packs / self.stage.batch.packs))

    @property
    def total_packs(self) -> int:
        """Packs with samples in a stage that ends with its samples."""
        if self._total_packs is None:
            if self.total_samples is None:
                return self.total_steps * self.stage.batch.packs
            with self._lock:
                while self._pack_window(self._anchors[-1]) is not None:
                    pass
                self._total_packs = self._anchors[-1].first_pack
        return self._total_packs

    def count_as(self, steps: int) -> None:
        """Take the number of steps from somebody who has counted them."""
        if self._steps_in_closed_form() is None and self._total_packs is None:
            self._total_packs = steps * self.stage.batch.packs

    def packs_of_step(self, step: int) -> list[PackSpec]:
        """The global batch of a step (from 0): `batch.packs` packs, the last step filled up with empty ones."""
        batch = self.stage.batch.packs
        return self.packs(step * batch, (step + 1) * batch)

    def packs(self, start: int, stop: int) -> list[PackSpec]:
        """Packs [start, stop) of the stage."""
        found: list[PackSpec] = []
        with self._lock:
            while start < stop:
                window = self._window_of(start)
                if window is None:
                    found += [PackSpec(pack, (), (), (), 0, PADDING_WINDOW) for pack in range(start, stop)]
                    break
                upto = min(stop, window.first_pack + len(window.packs))
                found += window.packs[start - window.first_pack : upto - window.first_pack]
                start = upto
        return found

    def steps(self, start: int = 0) -> Iterator[tuple[int, list[PackSpec]]]:
        """(step, its packs) from `start` to the stage's end."""
        for step in range(start, self.total_steps):
            yield step, self.packs_of_step(step)

    def deal(self, step: int, world_size: int) -> list[list[PackSpec]]:
        """The packs of a step for each rank: equal counts, balanced attention and vision cost."""
        if self.stage.batch.packs % world_size:
            raise InputError(
                f"stage {self.stage.name}: batch.packs is {self.stage.batch.packs}, which cannot be dealt evenly to"
                f" {world_size} workers; choose a multiple of the number of workers"
            )
        packs = self.packs_of_step(step)
        return [[packs[number] for number in hand] for hand in deal([self.costs.cost(p) for p in packs], world_size)]

    def spares(self, pack: PackSpec) -> PackSpares:
        """Who may stand in for each sample of a pack if its bytes are damaged: of sources with `on_damage: skip`."""
        assert self.recipe is not None
        rules = self.recipe.data.sources
        sources = self._stretch_of(pack.pack).sources
        tolerant = {s.name: s for s in sources if isinstance(s, EligibleSource) and rules[s.name].on_damage == "skip"}
        return spares_of_pack(pack, tolerant, self.seed) if tolerant else ()

    def balance(self, step: int, world_size: int) -> dict[str, float]:
        """Slowest rank over the average rank at a step: as dealt, and as it would be when dealt in order."""
        costs = [self.costs.cost(pack) for pack in self.packs_of_step(step)]
        return {
            "max_over_mean": max_over_mean(costs, deal(costs, world_size)),
            "in_order": max_over_mean(costs, deal_in_order(costs, world_size)),
        }

    # ------------------------------------------------------------ state

    def state(self, step: int) -> dict[str, Any]:
        """The position before a step, for a checkpoint: a few integers, the same for any number of workers."""
        pack = step * self.stage.batch.packs
        with self._lock:
            window = self._window_of(pack)
            anchor = self._anchor_of(pack)
        stretch = self._stretch_of(anchor.first_pack)
        state = {
            "version": 1,
            "plan": self.fingerprint,
            "step": step,
            "pack": pack,
            "window": anchor.window if window else PADDING_WINDOW,
            "window_first_pack": anchor.first_pack,
            "window_position": anchor.position,
        }
        if self._total_packs is not None:  # counted by planning all of it: never again
            state["total_packs"] = self._total_packs
        return state | ({"drawn_before_change": list(stretch.drawn)} if stretch.number else {})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state without walking through the windows before it.

        Raises InputError when the data, the mixture or the packing changed since: the order would be another one.
        """
        if state["plan"] != self.fingerprint:
            raise InputError(
                f"stage {self.stage.name}: the checkpoint's data order ({state['plan']}) is not this recipe's"
                f" ({self.fingerprint}): sources, mixture, seed, sequence length, pixels or batch changed since;"
                " restore them, or start the stage in a new run directory"
            )
        self._total_packs = state.get("total_packs", self._total_packs)
        with self._lock:
            if "drawn_before_change" in state:
                self._stretch_of(state["window_first_pack"]).begin(state["drawn_before_change"])
            self._remember(Anchor(state["window_first_pack"], state["window"], state["window_position"]))

    def explain(self) -> dict[str, Any]:
        """What the plan decided, for people: shares, samples, tokens, what was refused or changed."""
        total = sum(self.weights.values())
        return {
            "stage": self.stage.name,
            "plan": self.fingerprint,
            "unit": self.stage.mixture.unit,
            "sources": {
                source.name: {
                    "samples_per_epoch": source.count,
                    "mean_tokens": round(source.mean_tokens, 2),
                    "share_of_samples": self.weights[source.name] / total,
                    "limit_samples": limit,
                    "changes": source.changes,
                }
                for source, limit in zip(self.sources, self.interleave.limits)
            },
            "changes": [
                {
                    "step": stretch.first_pack // self.stage.batch.packs,
                    "pixels": [stretch.stage.pixels.min, stretch.stage.pixels.max],
                    "share_of_samples": {name: weight / sum(stretch.weights.values()) for name, weight in stretch.weights.items()},
                }
                for stretch in self.stretches[1:]
            ],
        }

    # ------------------------------------------------------------ windows

    def _stretch_of(self, pack: int) -> Stretch:
        return self.stretches[bisect_right(self.stretches, pack, key=lambda stretch: stretch.first_pack) - 1]

    def _remember(self, anchor: Anchor) -> None:
        place = bisect_right(self._anchors, anchor.first_pack, key=lambda known: known.first_pack)
        if self._anchors[place - 1].first_pack != anchor.first_pack:
            self._anchors.insert(place, anchor)

    def _anchor_of(self, pack: int) -> Anchor:
        return self._anchors[bisect_right(self._anchors, pack, key=lambda known: known.first_pack) - 1]

    def _window_of(self, pack: int) -> Window | None:
        """The window that holds a pack; None behind the last sample."""
        while True:
            window = self._pack_window(self._anchor_of(pack))
            if window is None or pack < window.first_pack + len(window.packs):
                return window

    def _pack_window(self, anchor: Anchor) -> Window | None:
        """Draw and pack the window at an anchor, and remember where the next one starts."""
        if anchor.window in self._windows:
            self._windows.move_to_end(anchor.window)
            return self._windows[anchor.window]
        window = self._packed(anchor)
        if window is None:
            return None
        self._windows[anchor.window] = window
        if len(self._windows) > CACHED_WINDOWS:
            self._windows.popitem(last=False)
        stretch, end, position = self._stretch_of(anchor.first_pack), window.first_pack + len(window.packs), window.next_position
        if end == stretch.stop_pack:
            assert stretch.interleave is not None
            self.stretches[stretch.number + 1].goes_on(stretch, stretch.interleave.counts(position))
            position = 0
        self._remember(Anchor(end, anchor.window + 1, position))
        return window

    def _packed(self, anchor: Anchor) -> Window | None:
        """The window at an anchor: of as many samples as windows have, or of fewer, so that it ends before the next change."""
        stretch, target = self._stretch_of(anchor.first_pack), self.window_samples
        room = math.inf if stretch.stop_pack is None else stretch.stop_pack - anchor.first_pack
        while True:
            stop = anchor.position + lookahead(target)
            if self.total_samples is not None:
                stop = min(stop, self.total_samples)
            sources, columns = stretch.columns(anchor.position, stop, self.seed)
            if not len(sources):
                return None
            _, keys = np.unique(np.stack([sources, columns["rows"], columns["starts"]]), axis=1, return_inverse=True)
            limit = self.stage.data_loading.max_visual_tokens_per_pack
            count, packs = pack_window(columns["lengths"], self.stage.sequence_length, target, columns["visual_tokens"], limit, keys)
            if len(packs) <= room:
                break
            target = max(1, min(target - 1, int(target * room) // len(packs)))
        held = [set(keys[members].tolist()) for members in packs]
        mean_lengths = [float(columns["lengths"][members].mean()) for members in packs]
        spread = spread_packs(mean_lengths, (seed_of(self.seed, "window", anchor.window) % 2**53) / 2**53)
        turned = repeats_apart(spread, held, anchor.first_pack, self.stage.batch.packs)
        specs = tuple(
            self._spec(anchor.first_pack + place, sorted(packs[turn]), sources, columns, anchor.window)
            for place, turn in enumerate(turned)
        )
        return Window(anchor.window, anchor.first_pack, specs, anchor.position + count)

    def _spec(self, pack: int, members: list[int], sources: np.ndarray, columns: dict[str, np.ndarray], window: int) -> PackSpec:
        chosen = {name: columns[name][members].tolist() for name in COLUMNS}
        refs, stretch = [], self._stretch_of(pack)
        for member, row in zip(members, chosen["rows"]):
            source = stretch.sources[sources[member]]
            refs.append(SampleRef(source.name, row, source.id_of(row)))
        spans = tuple(None if end < 0 else (start, end) for start, end in zip(chosen["starts"], chosen["stops"]))
        return PackSpec(
            pack=pack,
            samples=tuple(refs),
            lengths=tuple(chosen["lengths"]),
            visual_tokens=tuple(chosen["visual_tokens"]),
            pixel_rows=sum(chosen["pixel_rows"]),
            window=window,
            pixels_max=tuple(chosen["pixels_max"]) if any(chosen["pixels_max"]) else (),
            spans=spans if any(spans) else (),
            epochs=tuple(columns["epochs"][members].tolist()) if OBJECTIVES[self.stage.objective].draws_by_pass else (),
            pixels=stretch.pixels,
        )

