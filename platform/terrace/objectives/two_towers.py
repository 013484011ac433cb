"""What the objectives over pairs of two towers share: every pair of the global batch meets every other, with exact gradients.

The loss depends on the vectors of all pairs. Its slope with respect to them is all that a tower's backward needs:

    d loss / d weights = sum over pairs of (d vector / d weights) . (d loss / d vector)

So a step first runs every pack without gradient and keeps its vectors; the ranks exchange them and each computes the loss of
its own pairs and the slopes of its own vectors; then each pack runs again with gradient, and its backward starts from its
slopes. Activations of one pack exist at a time, whatever the batch. Where a rank has one pack, the first pass is left out: the
slopes are computed between forward and backward. Neither the number of packs nor that of ranks changes the loss or a gradient.

Temperature and bias get their slopes the same way, each pair its share.

Shape letters: B pairs of a pack, N pairs of a rank, L tokens, K kept patches, D width; `vectors` are [., 2, D]: picture, text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from terrace.data.types import PackedExample
from terrace.models.batch import ImageFacts, image_facts
from terrace.models.families.registry import family_model, family_of_model
from terrace.objectives.chance import kept_patches
from terrace.objectives.interface import Opening
from terrace.objectives.lm import empty_pack
from terrace.objectives.packs import PackObjective
from terrace.objectives.retrieval import recalls
from terrace.recipe.schema_pairs import PairOptions
from terrace.worker.collectives import gather_tensors
from terrace.worker.context import WorkerContext

SCALE = "logit_scale"  # the parameter that holds the logarithm of the scale


@dataclass(frozen=True)
class Share:
    """Of some pairs their part of the loss, and its slopes: of their vectors, and of scale and bias through each of them."""

    loss: torch.Tensor  # [N]
    vectors: torch.Tensor  # [N, 2, D]
    scale: torch.Tensor  # [N], of the logarithm
    bias: torch.Tensor | None = None  # [N]

    def part(self, start: int, stop: int) -> Share:
        bias = None if self.bias is None else self.bias[start:stop]
        return Share(self.loss[start:stop], self.vectors[start:stop], self.scale[start:stop], bias)


@dataclass
class PairBatch:
    """Pairs on the device. `results` is filled where only the vectors are asked for."""

    pairs: int
    ids: torch.Tensor  # int64 [B, L]
    mask: torch.Tensor  # int64 [B, L]
    pixels: torch.Tensor | None  # uint8 rows; None where there is no pair
    images: ImageFacts
    kept: torch.Tensor | None  # int64 [B, K]
    dtype: torch.dtype
    share: Share | None = None
    vectors_only: bool = False
    results: dict[str, torch.Tensor | None] = field(default_factory=dict)


class TwoTowersObjective(PackObjective):
    """A subclass says `share`: the loss of this rank's pairs among all, and its slopes."""

    coupled = True
    measured = True

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self.options = opening.stage.pairs or PairOptions()
        self._family = family_model(opening.feed.config)
        self._shares: dict[int, Share] = {}  # by pack
        self._single = False  # every rank has one pack in this step

    def share(self, vectors: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, context: WorkerContext) -> Share:
        """The share of this rank's pairs [N, 2, D] in the loss of all ranks' pairs. `scale` and `bias` are scalars."""
        raise NotImplementedError

    # ------------------------------------------------------------ a step

    def before(self, examples: Sequence[PackedExample], scale: float) -> None:
        """The pass without gradient over all packs but a single one."""
        self._shares, self._single = {}, len(examples) == 1
        if self._single:
            return
        vectors, scale_now, bias = self._vectors_of([self._batch(example, True) for example in examples])
        share = self.share(vectors, scale_now, bias, self.opening.context)
        start = 0
        for example in examples:
            stop = start + len(example.sample_ids)
            if stop > start:
                self._shares[example.pack] = share.part(start, stop)
            start = stop

    def _vectors_of(self, batches: Sequence[PairBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """[N, 2, D], scale and bias, without gradient."""
        for batch in batches:
            batch.vectors_only = True
            self.strategy.loss(batch)
        first = batches[0].results
        return torch.cat([batch.results["vectors"] for batch in batches]), first["scale"], first["bias"]

    def batch(self, example: PackedExample) -> PairBatch:
        batch = self._batch(example, True)
        batch.share = self._shares.get(example.pack)
        return batch

    def _batch(self, example: PackedExample, training: bool) -> PairBatch:
        opening, family = self.opening, self._family
        device, pairs = torch.device(opening.context.device), len(example.sample_ids)
        texts = np.split(example.input_ids, example.segment_ends[:-1]) if pairs else [np.zeros(1, np.int64)]
        ids, mask = family.text_rows(texts, opening.feed.config)

        def move(array: np.ndarray) -> torch.Tensor:
            tensor = torch.as_tensor(np.ascontiguousarray(array))
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        kept = self._kept(example) if training and self.options.masked_patches else None
        return PairBatch(
            pairs, move(ids), move(mask), move(example.pixels) if pairs else None, image_facts(example),
            None if kept is None else move(kept), opening.dtype,
        )  # fmt: skip

    def _kept(self, example: PackedExample) -> np.ndarray:
        patches = self._family.family.patches
        keep = max(1, round((1.0 - self.options.masked_patches) * patches))
        if not example.sample_ids:
            return np.arange(keep, dtype=np.int64)[None]
        return kept_patches(self.opening.stage.seed, example.sources, example.sample_ids, example.epochs, patches, keep)

    def loss(self, model: Any, batch: PairBatch) -> torch.Tensor:
        vectors = pair_vectors(model, batch)
        log_scale, bias = family_of_model(model).temperature(model)
        parameters = [wide(one).reshape(()) for one in (log_scale, bias) if one is not None]
        if batch.vectors_only:
            values = [one.detach() for one in parameters]
            batch.results = {"vectors": vectors[: batch.pairs], "scale": values[0], "bias": values[1] if bias is not None else None}
            return vectors.detach().sum() * 0.0
        share = batch.share
        if self._single:  # every rank is here
            values = [one.detach() for one in parameters]
            with torch.no_grad(), torch.autocast(vectors.device.type, enabled=False):
                own = vectors.detach()[: batch.pairs]
                share = self.share(own, values[0], values[1] if bias is not None else None, self.opening.context)
        if share is None or not batch.pairs:
            return 0.0 * vectors.sum() + sum(0.0 * one for one in parameters)  # each by itself: gradients of their own memory
        slopes = [share.scale, share.bias] if bias is not None else [share.scale]
        linear = (vectors * share.vectors).sum() + sum(one * slope.sum() for one, slope in zip(parameters, slopes))
        return share.loss.sum() + (linear - linear.detach())

    def after_step(self, step: int) -> None:
        self.strategy.hold_below(SCALE, math.log(self.options.highest_scale))

    # ------------------------------------------------------------ held-out pairs

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Of each kind of held-out pairs the loss of all of them as one batch, and recalls both ways."""
        alive()
        context, found = self.opening.context, {}
        self.strategy.model.eval()
        for kind, packs in sorted(self.opening.feed.held_out.items()):
            mine = [packs[place] if place < len(packs) else empty_pack() for place in _places(context.rank, len(packs), context)]
            batches = []
            for pack in mine:
                batches.append(self._batch(pack, False))
                vectors, scale, bias = self._vectors_of(batches[-1:])
                alive()
            vectors = torch.cat([batch.results["vectors"] for batch in batches])
            order = [
                pack for rank in range(context.world_size) for place in _places(rank, len(packs), context) if place < len(packs)
                for pack in [packs[place]]
            ]  # fmt: skip
            counts = [
                sum(len(packs[place].sample_ids) for place in _places(rank, len(packs), context) if place < len(packs))
                for rank in range(context.world_size)
            ]
            everything = gather_tensors(vectors, counts, context)
            share = self.share(everything, scale, bias, WorkerContext(device=context.device))
            found[f"{kind}/loss"] = float(share.loss.double().mean())
            captions = [text.tobytes() for pack in order for text in np.split(pack.input_ids, pack.segment_ends[:-1])]
            found |= {f"{kind}/{name}": value for name, value in recalls(*everything.unbind(1), captions).items()}
        self.strategy.model.train()
        return found


def _places(rank: int, packs: int, context: WorkerContext) -> range:
    """The packs that a rank evaluates: as many for each, those behind the last one are empty."""
    rounds = -(-packs // context.world_size)
    return range(rank, rounds * context.world_size, context.world_size)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pair_vectors(model: Any, batch: PairBatch) -> torch.Tensor:
    """[B, 2, D], each of length 1; of a batch without pairs one blank picture and text, which keep the collectives."""
    family = family_of_model(model)
    if batch.pixels is None:
        values, images = family.blank(batch.ids.device, family.compute_dtype(model))
    else:
        values, images = family.normalised(batch.pixels, batch.dtype), batch.images
    towers = family.image_vectors(model, values, images, batch.kept), family.text_vectors(model, batch.ids, batch.mask)
    return torch.stack([F.normalize(wide(vectors), dim=-1) for vectors in towers], dim=1)
