"""What models of two towers share with torch: vectors of pictures and of texts, temperature and bias.

The class's own `get_image_features` and `get_text_features` are called, so vectors are those that `from_pretrained` gives.
Texts stand side by side, padded; pictures too. A tower may be shown some of its patches only (FLIP).

Shape letters: B pictures or texts, L tokens, K patches that are kept, D the common width, R rows of pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoModel

from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel
from terrace.recipe.schema import PartName

OTHER_SPELLINGS = ("model.vision_tower.", "vision_tower.vision_model.", "vision_tower.")  # of the tower inside a larger model


class TwoTowersModel(FamilyModel):
    """Names are transformers' own, which CLIP and SigLIP share."""

    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("vision_model.", "vision"),
        ("text_model.", "language"),
        ("visual_projection.", "projector"),
        ("text_projection.", "projector"),
        ("logit_scale", "projector"),
        ("logit_bias", "projector"),
    )
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "vision_model.encoder.layers", "language": "text_model.encoder.layers"}
    embedding: ClassVar[str] = "text_model.embeddings.token_embedding.weight"
    head: ClassVar[str] = ""
    segmented = False
    starts_around = 1
    pads_to_context: ClassVar[bool] = False  # the padding is read, so there is as much of it as the published processor gives
    first_patches: ClassVar[int] = 0  # tokens of the tower before those of the patches

    def skeleton(self, config: Any) -> Any:
        return AutoModel.from_config(config, dtype=torch.float32)

    def canonical_name(self, name: str) -> str:
        for spelling in OTHER_SPELLINGS:
            if name.startswith(spelling):
                return "vision_model." + name.removeprefix(spelling)
        return name

    def vision(self, model: Any) -> Any:
        return model.vision_model

    def language(self, model: Any) -> Any:
        return model.text_model

    # ------------------------------------------------------------ texts

    def text_rows(self, texts: Sequence[np.ndarray], config: Any) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B, L] token ids, padded behind, and int64 [B, L]: 1 where a token stands."""
        longest = max((len(text) for text in texts), default=1)
        length = self.family.context if self.pads_to_context else longest
        ids = np.full((len(texts), length), config.text_config.pad_token_id, np.int64)
        mask = np.zeros((len(texts), length), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        return ids, mask

    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, D] of ids [B, L], of any length."""
        return model.get_text_features(input_ids=ids, return_dict=True).pooler_output

    # ------------------------------------------------------------ pictures

    def image_vectors(self, model: Any, values: torch.Tensor, images: ImageFacts, kept: torch.Tensor | None = None) -> torch.Tensor:
        """[B, D] of normalised rows [R, 3, values / 3], of any length; `kept` int64 [B, K] are the patches that the tower sees."""
        with self._only(model, kept):
            return model.get_image_features(**self.inputs(values, images), return_dict=True).pooler_output

    def image_features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> torch.Tensor:
        """[B, W]: what the vision tower says of each picture, before any map to the texts' width."""
        return self.vision(model)(**self.inputs(values, images), return_dict=True).pooler_output

    def view_features(self, model: Any, pictures: torch.Tensor) -> torch.Tensor:
        """The same of normalised pictures [B, 3, h, w] of any size."""
        return self.vision(model)(pixel_values=pictures, interpolate_pos_encoding=True, return_dict=True).pooler_output

    @contextlib.contextmanager
    def _only(self, model: Any, kept: torch.Tensor | None) -> Iterator[None]:
        """While it lasts, the blocks of the vision tower see the kept patches alone (and what stands before all patches)."""
        if kept is None:
            yield
            return
        first = torch.arange(self.first_patches, device=kept.device).expand(len(kept), -1)
        places = torch.cat([first, kept + self.first_patches], dim=1).unsqueeze(-1)

        def select(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            return embedded.gather(1, places.expand(-1, -1, embedded.shape[2]))

        hook = self.vision(model).embeddings.register_forward_hook(select)
        try:
            yield
        finally:
            hook.remove()

    # ------------------------------------------------------------ temperature

    def temperature(self, model: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logarithm of the scale, and the bias where the class has one."""
        return model.logit_scale, getattr(model, "logit_bias", None)
