"""Kimi K2.5 with torch: MoonViT takes patches as pictures, with their grids; checkpoints keep experts apart and projections together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers.models.kimi_k25.modeling_kimi_k25 import get_vision_frame_index, get_vision_temporal_merge_index
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_interpolation_indices_and_weights, get_vision_position_ids

from terrace.families.kimi_k25 import MERGE, PATCH
from terrace.models.batch import ImageFacts
from terrace.models.families.interface import Choice, FamilyModel, Features
from terrace.recipe.schema import PartName

_TOWER = (  # published, here: of what is not the tower's own spelling
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.blocks\.", "model.language_model.layers."),  # as transformers 5.23 saves what it read as layers
    (r"^language_model\.model\.", "model.language_model."),
    (r"^mm_projector\.proj\.0\.", "model.mm_projector.in_proj."),
    (r"^mm_projector\.proj\.2\.", "model.mm_projector.out_proj."),
    (r"^mm_projector\.", "model.mm_projector."),
    (r"^vision_tower\.encoder\.blocks\.(\d+)\.norm1\.", r"model.vision_tower.layers.\1.norm2."),
    (r"^vision_tower\.encoder\.blocks\.(\d+)\.norm0\.", r"model.vision_tower.layers.\1.norm1."),
    (r"^vision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc1\.", r"model.vision_tower.layers.\1.mlp.fc2."),
    (r"^vision_tower\.encoder\.blocks\.(\d+)\.mlp\.fc0\.", r"model.vision_tower.layers.\1.mlp.fc1."),
    (r"^vision_tower\.encoder\.blocks\.(\d+)\.wo\.", r"model.vision_tower.layers.\1.attn.proj."),
    (r"^vision_tower\.encoder\.blocks\.(\d+)\.", r"model.vision_tower.layers.\1."),
    (r"^vision_tower\.encoder\.", "model.vision_tower."),
    (r"^vision_tower\.patch_embed\.pos_emb\.weight$", "model.vision_tower.patch_embed.pos_emb.position_embeddings"),
    (r"^vision_tower\.", "model.vision_tower."),
)
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
_FUSED = re.compile(r"(.*)\.wqkv\.(weight|bias)$")


class KimiK25Model(FamilyModel):
    parts: ClassVar[tuple[tuple[str, PartName], ...]] = (
        ("model.vision_tower.", "vision"),
        ("model.mm_projector.", "projector"),
        ("model.language_model.", "language"),
        ("lm_head.", "language"),
    )
    blocks: ClassVar[Mapping[PartName, str]] = {"vision": "model.vision_tower.layers", "language": "model.language_model.layers"}
    held_buffers: ClassVar[tuple[str, ...]] = ("e_score_correction_bias",)
    tower_attention: ClassVar[str] = "segments"
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    def canonical_name(self, name: str) -> str:
        for pattern, here in _TOWER:
            found, count = re.subn(pattern, here, name)
            if count:
                return found
        return name

    def canonical_names(self, stored: str) -> tuple[str, ...]:
        name = self.canonical_name(stored)
        if match := _EXPERT.match(name):
            return (f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}",)
        if match := _FUSED.match(name):
            return tuple(f"{match[1]}.attn.{letter}_proj.{match[2]}" for letter in "qkv")
        return (name,)

    def joined(self, name: str, pieces: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
        names = {stored: self.canonical_name(stored) for stored in pieces}
        experts = {(int(match[2]), match[3]): pieces[stored] for stored, own in names.items() if (match := _EXPERT.match(own))}
        if experts:
            numbers = sorted({number for number, _ in experts})
            if name.endswith(".down_proj"):
                return torch.stack([experts[number, "down"] for number in numbers])
            return torch.stack([torch.cat([experts[number, "gate"], experts[number, "up"]]) for number in numbers])
        [(stored, tensor)] = pieces.items()
        if not _FUSED.match(names[stored]):
            return tensor
        letter = name.rpartition("_proj")[0][-1]
        part = tensor.chunk(3)["qkv".index(letter)]
        return part if letter == "v" else _split_rotary(part, int(config["vision_config"]["num_attention_heads"]))

    def routers(self, model: Any) -> list[Any]:
        return [layer.mlp.gate for layer in self.blocks_of(model, "language") if hasattr(layer.mlp, "gate")]

    def experts(self, model: Any) -> list[Any]:
        return [layer.mlp.experts for layer in self.blocks_of(model, "language") if hasattr(layer.mlp, "experts")]

    def choice(self, router: Any, output: Any) -> Choice:
        logits, _, experts = output
        scores = logits.float().sigmoid()
        return Choice(scores / scores.sum(dim=-1, keepdim=True), experts)

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        return {"pixel_values": values.view(-1, 3, PATCH, PATCH), "image_grid_thw": images.facts[:, :3]}

    def layout(self, grids: torch.Tensor, config: Any, device: torch.device) -> dict[str, Any]:
        """What the tower derives from the grids int64 [I, 3], computed on the host and copied once."""
        images = get_vision_cu_seqlens(grids, merge_temporal=True)
        indices, weights = get_vision_interpolation_indices_and_weights(
            grids, config.pos_emb_height, mode="bicubic", align_corners=False
        )
        tensors = {
            "position_ids": get_vision_position_ids(grids, 1), "cu_seqlens": images, "interp_indices": indices, "interp_weights": weights,
            "frame_index": get_vision_frame_index(grids), "temporal_merge_index": get_vision_temporal_merge_index(grids, MERGE, MERGE),
        }  # fmt: skip
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return moved | {"max_seqlen": int(images.diff().max())}

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        tower, inputs = self.vision(model), self.inputs(values, images)
        grids = inputs["image_grid_thw"]
        output = tower(inputs["pixel_values"], grid_thw=grids.to(values.device), **self.layout(grids, tower.config, values.device))
        return Features(model.model.mm_projector(output.pooler_output).squeeze(1))


def _split_rotary(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from pairs (real, imaginary) to all real ones and then all imaginary ones."""
    by_head = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return by_head.transpose(1, 2).reshape(tensor.shape)


MODEL = KimiK25Model
