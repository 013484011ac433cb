"""ViT-MAE with torch: positions are fixed sines and cosines, of the decoder too (transformers starts those at zero)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from transformers import AutoModelForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from terrace.families.vit_mae import VitMae
from terrace.models.batch import ImageFacts
from terrace.models.families.interface import FamilyModel
from terrace.models.families.vit import layer_name
from terrace.recipe.schema import PartName

FIXED = {"vit.embeddings.position_embeddings": "hidden_size", "decoder.decoder_pos_embed": "decoder_hidden_size"}


class VitMaeModel(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (("vit.", "vision"), ("decoder.", "projector"))
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "vit.layers"}
    embedding: ClassVar[str] = ""
    head: ClassVar[str] = ""
    mean = VitMae.mean
    std = VitMae.std
    segmented = False
    starts_around = 2

    def skeleton(self, config: Any) -> Any:
        return AutoModelForPreTraining.from_config(config, dtype=torch.float32)

    def initial(self, name: str, config: Any, shape: torch.Size) -> torch.Tensor | None:
        """Width before height, as the published weights have them."""
        if name not in FIXED:
            return None
        side = config.image_size // config.patch_size
        values = build_2d_sinusoidal_position_embedding(height=side, width=side, embed_dim=shape[-1], cls_token=True)
        return torch.cat([values[..., shape[-1] // 2 :], values[..., : shape[-1] // 2]], dim=-1).reshape(shape).float()

    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in FIXED]

    def canonical_name(self, name: str) -> str:
        return layer_name(name)

    def vision(self, model: Any) -> Any:
        return model.vit

    def drawn(self, model: Any, values: torch.Tensor, images: ImageFacts, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the decoder draws of every patch and what is there, [B, patches, values of a patch] both, and the mask [B, patches]:
        1 where the encoder did not look. The patches of lowest `noise` [B, patches] are seen."""
        pixels = self.inputs(values, images)["pixel_values"]
        seen = model.vit(pixels, noise=noise)
        return model.decoder(seen.last_hidden_state, seen.ids_restore).logits, model.patchify(pixels), seen.mask

    def image_features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> torch.Tensor:
        return self.view_features(model, self.inputs(values, images)["pixel_values"])

    def view_features(self, model: Any, pictures: torch.Tensor) -> torch.Tensor:
        """[B, W]: the mean over all patches of normalised pictures [B, 3, h, w] of any size, none of them masked."""
        patches = (pictures.shape[2] // model.config.patch_size) * (pictures.shape[3] // model.config.patch_size)
        order = torch.arange(patches, device=pictures.device, dtype=torch.float32).expand(len(pictures), -1)
        masked, model.config.mask_ratio = model.config.mask_ratio, 0.0
        try:
            return model.vit(pictures, noise=order, interpolate_pos_encoding=True).last_hidden_state[:, 1:].mean(1)
        finally:
            model.config.mask_ratio = masked


MODEL = VitMaeModel
