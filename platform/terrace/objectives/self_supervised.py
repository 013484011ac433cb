"""What the objectives over views of pictures share: the views, the two passes, the teacher, what is remembered, what is measured.

A subclass says `losses`: of some pictures, what the tower says of their views to their losses. Where the pictures of the global batch
meet in it (other pictures as wrong answers, a norm over the batch, an assignment in equal parts), the tower runs over every pack without
gradient first; every rank brings all features together, runs the heads over the whole batch, and gets the slopes of its own features;
then each pack runs again, and its backward starts from its slopes. The heads' gradient is that of the whole batch on every rank, so each
gives its share of it. Neither the number of packs nor that of ranks changes the loss or a gradient. Where a rank has one pack, the first
pass is left out.

Where pictures do not meet, each pack gives its loss at once. What a step leaves behind (a queue, a centre, a bank, the teacher) changes
after the optimizer's step, in the order of the global batch, and is part of checkpoints.

Shape letters: B pictures of a pack, N pictures, V views, T views of the teacher, W the tower's width, D the heads' width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from terrace.data.order.permutation import seed_of
from terrace.data.types import PackedExample
from terrace.data.views.augment import make_views
from terrace.data.views.plans import plan_views, single_views
from terrace.models.families.registry import family_model, family_of_model
from terrace.models.precision import compute_context
from terrace.objectives.interface import Opening
from terrace.objectives.lm import empty_pack
from terrace.objectives.mae import HELD_OUT
from terrace.objectives.packs import PackObjective
from terrace.objectives.paths import drawn_paths, running_paths
from terrace.objectives.teacher import Teacher, momentum_at
from terrace.objectives.together import Together
from terrace.objectives.two_towers import wide

Views = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """Pictures of which losses are asked."""

    features: torch.Tensor  # [N, V, W]
    teacher: torch.Tensor | None  # [N, T, W]
    keys: torch.Tensor  # int64 [N], one for each sample of each source


@dataclass(frozen=True)
class Told:
    losses: torch.Tensor  # [N]
    vectors: torch.Tensor  # [N, V, D], of length 1: whether they spread is measured
    kept: dict[str, torch.Tensor] = field(default_factory=dict)  # [N, ...] each, for `remember`
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # over these pictures, for `remember`


@dataclass
class ViewBatch:
    """Views of the pictures of a pack on the device; of a pack without any, of one blank picture."""

    pictures: int
    views: Views  # V of [B, 3, s, s], normalised
    keys: torch.Tensor
    purpose: str = "train"  # or `features`, `judge`
    number: int = 0  # of the pack in the step
    teacher: torch.Tensor | None = None
    paths: torch.Tensor | None = None  # [V, B, L, 2]: factors of the branches of the tower's blocks; None: nothing is left out
    results: dict[str, torch.Tensor] = field(default_factory=dict)


class ViewsObjective(PackObjective):
    """See the module's docstring."""

    name: ClassVar[str]
    compares: ClassVar[bool] = True  # the pictures of the batch meet in the loss itself
    judges: ClassVar[bool] = True  # the loss of pictures that were never trained on says something

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        stage = opening.stage
        self.options: Any = stage.view_options
        self.views = stage.planned_views
        self.meets = self.compares or self.options.norm == "batch"
        self.coupled = self.meets
        self.dtype = opening.dtype
        self.kept = self.first_state()
        self._family = family_model(opening.feed.config)
        self._teacher: Teacher | None = None
        self._numbers = 0  # of packs of this step that were made
        self._together: Together | None = None
        self._everything: Seen | None = None  # of the whole batch, once its features are together
        self._slopes: torch.Tensor | None = None
        self._starts: list[int] = []  # of each pack among this rank's rows
        self._told: list[Told] = []
        self._held_out: tuple[Together, Sequence[ViewBatch]] | None = None  # that are judged: their order, and those that ran already
        self._judged: Told | None = None
        self._ran = False

    # ------------------------------------------------------------ what a subclass says

    def losses(self, heads: Any, seen: Seen) -> Told:
        raise NotImplementedError

    def teacher_views(self) -> Sequence[int]:
        """The views that a teacher sees; none: there is no teacher."""
        return ()

    def student_views(self) -> Sequence[int] | slice:
        """The views that the tower sees."""
        return slice(None)

    def shown(self, views: Views) -> Views:
        """What stands in the place of the views."""
        return views

    def first_state(self) -> dict[str, torch.Tensor]:
        """What `remember` changes, by name: part of checkpoints."""
        return {}

    def remember(self, kept: dict[str, torch.Tensor], sums: dict[str, torch.Tensor], pictures: int) -> None:
        """After the optimizer's step: what `losses` kept of all pictures of the global batch, in their order, and its sums over them."""

    # ------------------------------------------------------------ words for subclasses

    def progress(self) -> float:
        """Share of the stage's steps that are done."""
        return self.step / max(1, self.opening.feed.total_steps)

    def rng(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(seed_of(purpose, self.opening.stage.seed))

    @staticmethod
    def key_of(source: str, sample: str) -> int:
        """63 bits that stand for a sample."""
        return seed_of("sample", source, sample) >> 1

    @property
    def teacher(self) -> Teacher | None:
        """Begins as a copy of the student where no checkpoint brought it."""
        if self._teacher is None and self.teacher_views():
            self._teacher = self._new_teacher()
            self._teacher.copy(self.strategy.tensors("weights"))
        return self._teacher

    def _new_teacher(self) -> Teacher:
        return Teacher(self.name, self.options, self.opening.feed.config, self.opening.context.device)

    # ------------------------------------------------------------ a step

    def before(self, examples: Sequence[PackedExample], scale: float) -> None:
        self._told, self._numbers, self._everything, self._slopes, self._ran = [], 0, None, None, False
        assert self.teacher is not None or not self.teacher_views()  # made before the model runs
        self._together = Together(examples, self.opening.context)
        self._starts = np.cumsum([0, *(len(example.sample_ids) for example in examples)]).tolist()
        if self.meets and len(examples) > 1:
            self._everything = self._features_of([self._batch(example, "features") for example in examples], self._together)

    def batch(self, example: PackedExample) -> ViewBatch:
        batch = self._batch(example, "train")
        batch.number, self._numbers = self._numbers, self._numbers + 1
        return batch

    def _batch(self, example: PackedExample, purpose: str) -> ViewBatch:
        opening, side, pictures = self.opening, self._family.family.side, len(example.sample_ids)
        device, singles = torch.device(opening.context.device), single_views(self.views)
        keys = [self.key_of(source, sample) for source, sample in zip(example.sources, example.sample_ids)]
        keys = torch.tensor(keys, dtype=torch.int64, device=device)
        if not pictures:
            sides = [view.side or side for view in singles]
            blank = [torch.zeros(1, 3, size, size, dtype=self.dtype, device=device) for size in sides]
            return ViewBatch(0, self.shown(blank), keys, purpose)
        squares = torch.from_numpy(example.pixels).to(device).view(pictures, 3, side, side)
        epochs = example.epochs.tolist() or [HELD_OUT] * pictures
        plans = [
            plan_views(self.views, side, opening.stage.seed, source, sample, int(epoch))
            for source, sample, epoch in zip(example.sources, example.sample_ids, epochs, strict=True)
        ]
        views = [make_views(squares, column) for column in zip(*plans)]
        views = self.shown([self._family.normalised(255.0 * view.flatten(1), self.dtype).view(view.shape) for view in views])
        paths = drawn_paths(opening, self._family, example, epochs, len(views))
        return ViewBatch(pictures, views, keys, purpose, paths=paths)

    def loss(self, model: Any, batch: ViewBatch) -> torch.Tensor:
        wanted = self.student_views()
        places = range(len(batch.views))[wanted] if isinstance(wanted, slice) else wanted
        views = [batch.views[place] for place in places]
        paths = batch.paths[list(places)] if batch.paths is not None else None
        features = wide(self._tower(family_of_model(model).view_features, model, views, paths))
        heads = model.heads
        nothing = 0.0 * features.sum() + sum((0.0 * weight).sum() for weight in heads.parameters())  # every gradient is there
        own = features[: batch.pictures]
        with torch.autocast(features.device.type, enabled=False):
            if batch.purpose == "features":
                batch.results["features"] = own.detach()
                return nothing.detach()
            if batch.purpose == "judge":
                batch.results["features"] = own.detach()
                self._judged = self.losses(heads, self._features_of([batch], *self._held_out))
                return nothing.detach()
            if self.meets:
                return nothing + self._met(heads, own, batch)
            told = self.losses(heads, Seen(own, self._taught(batch), batch.keys))
            self._told.append(_detached(told))
            return nothing + told.losses.sum()

    def _met(self, heads: Any, own: torch.Tensor, batch: ViewBatch) -> torch.Tensor:
        """This pack's part of the loss of the whole batch; the first pack's carries this rank's share of the heads' gradient."""
        of_heads = own.new_zeros(())
        if batch.number == 0:
            if self._everything is None:  # this rank's only pack, and every rank is here
                batch.results["features"] = own.detach()
                self._everything = self._features_of([batch], self._together)
            seen = self._everything
            leaf = seen.features.detach().requires_grad_(True)
            with torch.enable_grad():
                told = self.losses(heads, Seen(leaf, seen.teacher, seen.keys))
                whole = told.losses.sum()
                [slopes] = torch.autograd.grad(whole, leaf, retain_graph=True)
            self._told = [_detached(told)]
            self._slopes = slopes[self._together.own]
            of_heads = whole / self.opening.context.world_size
        rows = slice(self._starts[batch.number], self._starts[batch.number + 1])
        value = self._told[0].losses[self._together.own[rows]].sum()
        linear = (own * self._slopes[rows]).sum() + of_heads
        return value + (linear - linear.detach())

    def _tower(
        self, give: Callable[[Any, torch.Tensor], torch.Tensor], model: Any, views: Views, paths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, V, W]; neighbouring views of one size run at once. `paths`: factors of the branches [V, B, L, 2]."""
        found, start = [], 0
        while start < len(views):
            stop = start + 1
            while stop < len(views) and views[stop].shape == views[start].shape:
                stop += 1
            with running_paths(model, paths[start:stop].flatten(0, 1) if paths is not None else None, first=not start):
                found += give(model, torch.cat(list(views[start:stop]))).chunk(stop - start)
            start = stop
        return torch.stack(found, dim=1)

    def _taught(self, batch: ViewBatch) -> torch.Tensor | None:
        """[B, T, W] of the teacher."""
        if not self.teacher_views():
            return None
        if batch.teacher is None:
            views, device = [batch.views[place] for place in self.teacher_views()], self.opening.context.device
            with torch.no_grad(), compute_context(self.opening.stage.precision, device):
                give = family_of_model(self.teacher.model).view_features
                batch.teacher = wide(self._tower(give, self.teacher.model, views))[: batch.pictures]
        return batch.teacher

    def _features_of(self, batches: Sequence[ViewBatch], together: Together, others: Sequence[ViewBatch] = ()) -> Seen:
        """Of all ranks, in the global order: those of this rank's batches, which run here unless they ran before."""
        for batch in batches:
            if "features" not in batch.results:
                self.strategy.loss(batch)
        mine = [*others, *batches]
        taught = [self._taught(batch) for batch in mine]
        return Seen(
            together.rows(torch.cat([batch.results["features"] for batch in mine])),
            together.rows(torch.cat(taught)) if self.teacher_views() else None,
            together.rows(torch.cat([batch.keys for batch in mine])),
        )

    # ------------------------------------------------------------ after a step

    def values(self, ran: bool) -> dict[str, Any]:
        """How far the pictures' vectors lie apart: 1 where they point everywhere, 0 where the tower says the same of all."""
        self._ran = ran
        if not ran:
            return {}
        sums = [told.vectors.double().sum((0, 1)) for told in self._told]
        pairs = sum(told.vectors.shape[0] * told.vectors.shape[1] for told in self._told)
        row = torch.stack(sums).sum(0).tolist()
        total = np.asarray([*row, float(pairs)]) if self.meets else self.opening.total([*row, float(pairs)])
        return {"spread": spread(total[:-1] / total[-1])}

    def after_step(self, step: int) -> None:
        if not self._ran:
            return
        self._ran = False
        kept = {name: torch.cat([told.kept[name] for told in self._told]) for name in self._told[0].kept}
        sums = {name: torch.stack([told.sums[name] for told in self._told]).sum(0) for name in self._told[0].sums}
        if not self.meets:  # each rank has told of its own
            kept = {name: self._together.rows(rows) for name, rows in kept.items()}
            for name, own in sums.items():
                sums[name] = torch.from_numpy(self.opening.total(own.double().flatten().tolist())).to(own).view_as(own)
        self.remember(kept, sums, sum(self._together.counts))
        if self.teacher is not None:
            momentum = momentum_at(self.options, self.step, self.opening.feed.total_steps)
            self.teacher.follow(self.strategy.tensors("weights"), momentum)
        self._told, self._everything, self._slopes = [], None, None

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "step", torch.tensor([self.step])
        yield from self.kept.items()
        if self.teacher is not None:
            yield from self.teacher.state()

    def load(self, source: Callable[[str], torch.Tensor]) -> None:
        self.step = int(source("step"))
        device = self.opening.context.device
        self.kept = {name: source(name).to(device).clone() for name in self.kept}  # where memory begins decides the last bits of products
        if self.teacher_views():
            self._teacher = self._new_teacher()
            self._teacher.load(source)

    # ------------------------------------------------------------ held-out pictures

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Of each kind of held-out pictures the mean loss of all of them as one batch, in the same views each time, and their spread."""
        alive()
        assert self.teacher is not None or not self.teacher_views()  # made before the model runs
        context, found = self.opening.context, {}
        self.strategy.model.eval()
        for kind, packs in sorted(self.opening.feed.held_out.items()):
            rounds = -(-len(packs) // context.world_size)
            places = range(context.rank, rounds * context.world_size, context.world_size)
            mine = [packs[place] if place < len(packs) else empty_pack() for place in places]
            batches = [self._batch(pack, "features") for pack in mine]
            for batch in batches[:-1]:
                self.strategy.loss(batch)
                alive()
            self._held_out, batches[-1].purpose = (Together(mine, context), batches[:-1]), "judge"
            self.strategy.loss(batches[-1])
            alive()
            told, self._judged, self._held_out = self._judged, None, None
            found |= {f"{kind}/loss": float(told.losses.double().mean())} if self.judges else {}
            found[f"{kind}/spread"] = spread(told.vectors.double().mean((0, 1)).cpu().numpy())
        self.strategy.model.train()
        return found


def _detached(told: Told) -> Told:
    kept, sums = ({name: rows.detach() for name, rows in some.items()} for some in (told.kept, told.sums))
    return Told(told.losses.detach(), told.vectors.detach(), kept, sums)


def spread(mean: np.ndarray) -> float:
    """Root of 1 - |mean|^2 of vectors of length 1: their deviation around their mean."""
    return float(np.sqrt(max(0.0, 1.0 - float((mean**2).sum()))))


def newest(rows: torch.Tensor, more: torch.Tensor, most: int) -> torch.Tensor:
    """The last `most` of both, in memory of their own: products of a part of other memory differ in their last bits."""
    return torch.cat([rows, more.to(rows)])[-most:].clone()


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(wide(vectors), dim=-1)
