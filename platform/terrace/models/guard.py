"""The text-only guard: a pack without an image still runs the vision tower, on one blank image whose result counts
zero.

Without it a rank whose packs hold no image leaves every vision parameter without a gradient. Ranks then issue
different collectives: FSDP2 and ZeRO-3 dead-lock, DDP fails at the next step. The blank image has 4 patches, the
least the tower takes.
"""

from __future__ import annotations

import torch

from terrace.data.types import PATCH_VALUES
from terrace.models.batch import TEMPORAL_PATCH_SIZE

BLANK_GRID = ((1, 2, 2),)


def blank_image(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixel values [4, 1176] of zeros, grids [1, 3]): one image of one visual token."""
    pixels = torch.zeros(4, PATCH_VALUES * TEMPORAL_PATCH_SIZE, device=device, dtype=dtype)
    return pixels, torch.tensor(BLANK_GRID, dtype=torch.int64)


def count_as_zero(embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The embeddings unchanged, with every vision parameter in their graph at gradient zero."""
    return embeddings + 0.0 * features.sum().to(embeddings.dtype)
