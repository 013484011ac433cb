"""Masked autoencoder: draw the patches that the encoder did not see.

    loss = sum over pictures of the mean, over their masked patches, of the mean squared difference of pixels

The loop divides by the pictures of the global batch. `mask_ratio` and `norm_pix_loss` are the model's own configuration; which
patches a picture shows is drawn from (stage seed, source, sample, epoch), and so is the view of it, where the stage has `views`; held-out
pictures are seen whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from terrace.data.types import PackedExample
from terrace.data.views.augment import make_views
from terrace.data.views.plans import plan_views
from terrace.models.batch import ImageFacts, image_facts
from terrace.models.families.registry import family_model, family_of_model
from terrace.objectives.chance import patch_noise
from terrace.objectives.interface import Opening
from terrace.objectives.lm import empty_pack
from terrace.objectives.packs import PackObjective
from terrace.objectives.paths import drawn_paths, running_paths
from terrace.objectives.two_towers import wide

EPSILON = 1e-6  # beside a patch's variance
HELD_OUT = -1  # the epoch of held-out pictures: the same patches at every evaluation


@dataclass
class PictureBatch:
    """Pictures on the device; none: `pixels` is None."""

    pictures: int
    pixels: torch.Tensor | None  # uint8 rows, or of a view float ones in the same range
    images: ImageFacts
    noise: torch.Tensor  # float32 [B, patches]
    dtype: torch.dtype
    paths: torch.Tensor | None = None  # [B, L, 2]: factors of the branches of the encoder's blocks; None: nothing is left out


class MaskedAutoencoder(PackObjective):
    """Packs of a fixed number of pictures."""

    measured = True

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._family = family_model(opening.feed.config)

    def batch(self, example: PackedExample) -> PictureBatch:
        opening, pictures = self.opening, len(example.sample_ids)
        epochs = example.epochs.tolist() or [HELD_OUT] * pictures
        noise = patch_noise(opening.stage.seed, example.sources, example.sample_ids, epochs, self._family.family.patches)
        noise = noise if pictures else np.zeros((1, noise.shape[1]), np.float32)
        device = torch.device(opening.context.device)
        pixels = torch.from_numpy(example.pixels).to(device) if pictures else None
        if opening.stage.views and len(example.epochs):
            pixels = self._views(pixels, example)
        paths = drawn_paths(opening, self._family, example, epochs, 1)
        noise_there = torch.from_numpy(noise).to(device)
        return PictureBatch(pictures, pixels, image_facts(example), noise_there, opening.dtype, None if paths is None else paths[0])

    def _views(self, pixels: torch.Tensor, example: PackedExample) -> torch.Tensor:
        """One view of each picture, in its place."""
        seed, side = self.opening.stage.seed, self._family.family.side
        plans = [
            plan_views(self.opening.stage.views, side, seed, source, sample, int(epoch))[0]
            for source, sample, epoch in zip(example.sources, example.sample_ids, example.epochs, strict=True)
        ]
        return 255.0 * make_views(pixels.view(-1, 3, side, side), plans).flatten(1)

    def loss(self, model: Any, batch: PictureBatch) -> torch.Tensor:
        return summed_loss(model, batch)

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Mean loss per picture of each kind of held-out samples."""
        alive()
        context, found = self.opening.context, {}
        self.strategy.model.eval()
        for kind, packs in sorted(self.opening.feed.held_out.items()):
            sums = [0.0, 0.0]
            for start in range(0, len(packs), context.world_size):
                place = start + context.rank
                pack = packs[place] if place < len(packs) else empty_pack()
                sums[0] += float(self.strategy.loss(self.batch(pack)))
                sums[1] += len(pack.sample_ids)
                alive()
            total = self.opening.gather(sums).sum(axis=0)
            found[f"{kind}/loss"] = float(total[0] / total[1])
        self.strategy.model.train()
        return found


open_objective = MaskedAutoencoder


def summed_loss(model: Any, batch: PictureBatch) -> torch.Tensor:
    """Summed over the pictures; a batch without any runs a blank one, for the collectives."""
    family = family_of_model(model)
    if batch.pixels is None:
        blank = family.blank(batch.noise.device, family.compute_dtype(model))
        return 0.0 * family.drawn(model, *blank, batch.noise)[0].float().sum()
    values = family.normalised(batch.pixels, batch.dtype)
    with running_paths(model, batch.paths, first=True):
        drawn, there, mask = family.drawn(model, values, batch.images, batch.noise)
    there = wide(there)
    if model.config.norm_pix_loss:
        there = (there - there.mean(-1, keepdim=True)) / (there.var(-1, keepdim=True) + EPSILON).sqrt()
    difference = (wide(drawn) - there).square().mean(-1)
    return ((difference * mask).sum(1) / mask.sum(1)).sum()
