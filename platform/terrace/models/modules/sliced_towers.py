"""CLIP's and SigLIP's embedding of patches for pictures of any aspect: positions are the table of the tower's square, for each picture
stretched over its own grid (`interpolated`, LLaVA-UHD), or read at the place of the square that a patch falls into (`bucketed`,
MiniCPM-V, as NaViT's and Idefics' towers).

Shape letters: N pictures, P patches of the largest, S side of a patch, W width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from .padded_pictures import padded_tables


def bucketed_places(rows: int, columns: int, side: int) -> torch.Tensor:
    """int64 [rows * columns]: of which of `side` x `side` places each patch of a picture reads its position."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side)

    def along(count: int) -> torch.Tensor:
        shares = (torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))).clamp(max=1.0 - 1e-6)
        return torch.bucketize(shares, boundaries, right=True)

    return (along(rows)[:, None] * side + along(columns)).flatten()


class SlicedEmbeddings:
    """Stands before the class of a tower's embeddings. `sizes`, (rows, columns) of each picture, is set before every call."""

    bucketed: bool
    sizes: Sequence[tuple[int, int]]

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """[N, P, 3, S, S] -> [N, P, W], a class token in front where the tower has one."""
        own: Any = self
        count, patches = pixel_values.shape[:2]
        embedded = own.patch_embedding(pixel_values.flatten(0, 1)).flatten(1).unflatten(0, (count, patches))
        table = own.position_embedding(own.position_ids[0])
        first = table[: len(table) - own.num_patches]  # of a class token
        square = table[len(first) :]
        if self.bucketed:
            side = own.image_size // own.patch_size
            places = padded_tables(self.sizes, lambda rows, columns: bucketed_places(rows, columns, side)[:, None], patches)
            positions = square[places[..., 0].to(square.device)]
        else:
            positions = padded_tables(self.sizes, lambda rows, columns: stretched(square, rows, columns), patches)
        embedded = embedded + positions.to(embedded.dtype)
        if not len(first):
            return embedded
        start = (own.class_embedding + first[0]).to(embedded.dtype)
        return torch.cat([start.expand(count, 1, -1), embedded], dim=1)


class SlicedClipEmbeddings(SlicedEmbeddings, CLIPVisionEmbeddings):
    pass


class SlicedSiglipEmbeddings(SlicedEmbeddings, SiglipVisionEmbeddings):
    pass


def stretched(square: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A table [side * side, W] over another grid by bicubic interpolation: [rows * columns, W]."""
    side = round(len(square) ** 0.5)
    if (rows, columns) == (side, side):
        return square
    picture = square.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(picture, (rows, columns), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).flatten(0, 1).to(square.dtype)


def give_slices(tower: Any, bucketed: bool) -> SlicedEmbeddings:
    """Put such embeddings into a tower, and return them."""
    kinds = {"clip_vision_model": SlicedClipEmbeddings, "siglip_vision_model": SlicedSiglipEmbeddings}
    before = tower.embeddings
    tower.embeddings = kinds[tower.config.model_type](tower.config)
    tower.embeddings.patch_embedding = before.patch_embedding  # of a tower that embeds patches otherwise
    tower.embeddings.bucketed = bucketed
    return tower.embeddings
