"""Chameleon with torch: placeholders become the codes of their pictures, as what is read and as what is to be predicted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from terrace.families.chameleon import STEP
from terrace.models.batch import DeviceBatch, ImageFacts
from terrace.models.families.interface import FamilyModel, Features
from terrace.recipe.schema import PartName


class ChameleonModel(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("model.vqmodel.", "vision"), ("model.", "language"), ("lm_head.", "language"))
    blocks: ClassVar[Mapping[PartName, str]] = {"language": "model.layers"}
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    mean = (1 / (255 * STEP),) * 3
    std = (1 / (255 * STEP),) * 3

    def canonical_name(self, name: str) -> str:
        return name

    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        """A code is a choice, through which no gradient comes."""
        return [name for name in names if name.startswith("model.vqmodel.")]

    def vision(self, model: Any) -> Any:
        return model.model.vqmodel

    def language(self, model: Any) -> Any:
        return model.model

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        with torch.no_grad():
            codes = model.get_image_tokens(**self.inputs(values, images)).flatten().to(torch.int64)
        return Features(model.model.embed_tokens(codes[None])[0], codes=codes)

    def seen(self, model: Any, batch: DeviceBatch, features: Features) -> None:
        """Where a placeholder is to be predicted, its code is."""
        image = model.config.image_token_id
        number = (batch.input_ids[0] == image).cumsum(0) - 1  # of the placeholder at or before each place
        behind = (batch.supervised_rows + 1).clamp(max=len(number) - 1)
        codes = features.codes[number[behind].clamp(min=0)]
        batch.targets = torch.where(batch.targets == image, codes, batch.targets)


MODEL = ChameleonModel
