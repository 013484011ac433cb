"""A plain vision transformer with torch; also the spellings in which encoders of pictures were published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import AutoModel

from terrace.families.vit import Vit
from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel
from terrace.recipe.schema import PartName

SPELLINGS = (  # of the layers before transformers 5, in this order
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(query|key|value)\.", lambda found: f"attention.{found[1][0]}_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
)


def layer_name(name: str) -> str:
    """A tensor's name of any published spelling as transformers names it here."""
    for pattern, here in SPELLINGS:
        name = re.sub(pattern, here, name)
    return name


class VitModel(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("", "vision"),)
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "layers"}
    embedding: ClassVar[str] = ""
    head: ClassVar[str] = ""
    mean = Vit.mean
    std = Vit.std
    segmented = False

    def skeleton(self, config: Any) -> Any:
        return AutoModel.from_config(config, dtype=torch.float32, add_pooling_layer=False)

    def canonical_name(self, name: str) -> str:
        return layer_name(name.removeprefix("vit."))

    def vision(self, model: Any) -> Any:
        return model

    def view_features(self, model: Any, pictures: torch.Tensor) -> torch.Tensor:
        """[B, W]: the class token behind the last norm, of normalised pictures [B, 3, h, w] of any size."""
        return self.vision(model)(pictures, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    def image_features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> torch.Tensor:
        return self.view_features(model, self.inputs(values, images)["pixel_values"])


MODEL = VitModel
