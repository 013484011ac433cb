"""SigLIP 2 with torch: patches of every picture side by side, padded to the most that any of the batch has."""

from __future__ import annotations

from typing import Any

import torch

from terrace.errors import InputError
from terrace.models.batch import ImageFacts
from terrace.models.families.siglip import SiglipModel


class Siglip2Model(SiglipModel):
    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        """Rows are patches [R, 3, side * side]; the class wants the colours of a pixel together."""
        counts = images.rows.tolist()
        patches = values.transpose(1, 2).reshape(len(values), -1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(count, dtype=torch.int64) for count in counts], batch_first=True)
        return {
            "pixel_values": torch.nn.utils.rnn.pad_sequence(patches.split(counts), batch_first=True),
            "pixel_attention_mask": mask.to(values.device),
            "spatial_shapes": images.facts,  # on the host: the class reads it there
        }

    def image_vectors(self, model: Any, values: torch.Tensor, images: ImageFacts, kept: torch.Tensor | None = None) -> torch.Tensor:
        if kept is not None:
            raise InputError("pairs.masked_patches: siglip2 shows each picture its own number of patches; masks are for clip and siglip")
        return super().image_vectors(model, values, images)


MODEL = Siglip2Model
