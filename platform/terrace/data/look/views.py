"""The views of a picture as a stage compares them, for a page: each with what chance decided of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from terrace.data.views.augment import make_views
from terrace.data.views.plans import plan_views
from terrace.recipe.schema import Stage


def shown_views(pixels: np.ndarray, stage: Stage, source: str, sample: str, epoch: int) -> Iterator[tuple[str, np.ndarray]]:
    """(how it is made, uint8 [s, s, 3]) of every view of a square of pixels uint8 [S, S, 3]."""
    square = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    for plan in plan_views(stage.planned_views, pixels.shape[0], stage.seed, source, sample, epoch):
        made = (make_views(square, [plan])[0] * 255).round().to(torch.uint8)
        yield str(plan), made.permute(1, 2, 0).numpy()
