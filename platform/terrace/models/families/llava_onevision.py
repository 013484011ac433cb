"""LLaVA-OneVision with torch: LLaVA-NeXT, and images among several, of which the class is told how many there are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from terrace.models.batch import ImageFacts
from terrace.models.families.interface import Features
from terrace.models.families.llava_next import LlavaNextModel


class LlavaOnevisionModel(LlavaNextModel):
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def order(self, images: ImageFacts) -> torch.Tensor:
        """Images that stand alone in their samples first, then those among several: so that one number tells of all the latter."""
        return torch.argsort(images.facts[:, 2], stable=True)

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        order, several = self.order(images), int(images.facts[:, 2].sum())
        if order.tolist() != list(range(len(order))):
            parts = values.split(images.rows.tolist())
            values = torch.cat([parts[place] for place in order.tolist()])
            images = ImageFacts(images.facts[order], images.tokens[order], images.rows[order])
        counts = [1] * (len(order) - several) + ([max(2, several)] if several else [])  # the class reads 1 as an image that stands alone
        given = super().inputs(values, ImageFacts(images.facts[:, :2], images.tokens, images.rows))
        return {**given, "batch_num_images": torch.tensor(counts)}

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        found = model.model.get_image_features(**self.inputs(values, images), return_dict=True).pooler_output
        return Features(torch.cat([found[place] for place in torch.argsort(self.order(images)).tolist()]))


MODEL = LlavaOnevisionModel
