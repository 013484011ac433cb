"""Qwen3-VL with a mixture of experts, with torch: which modules route, and the published order of the experts' matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from terrace.models.families.interface import Choice
from terrace.models.families.qwen3_vl import Qwen3VLModel


class Qwen3VLMoeModel(Qwen3VLModel):
    def routers(self, model: Any) -> list[Any]:
        return [layer.mlp.gate for layer in self.blocks_of(model, "language") if hasattr(layer.mlp, "gate")]

    def experts(self, model: Any) -> list[Any]:
        return [layer.mlp.experts for layer in self.blocks_of(model, "language") if hasattr(layer.mlp, "experts")]

    def choice(self, router: Any, output: Any) -> Choice:
        logits, _, experts = output
        return Choice(logits.float().softmax(dim=-1), experts)

    def joined(self, name: str, pieces: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
        """Published matrices of the experts are [experts, in, out], those of the class [experts, out, in]."""
        [tensor] = pieces.values()
        width = (config.get("text_config") or {}).get("hidden_size")
        return tensor.transpose(1, 2).contiguous() if width and _turned(name, tensor, width) else tensor

    def stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """As published. Where both orders have one shape transformers reads the class's own, so that one is written."""
        turned = ".mlp.experts." in name and tensor.shape[1] != tensor.shape[2]
        return {self.published_name(name): tensor.transpose(1, 2) if turned else tensor}


def _turned(name: str, tensor: torch.Tensor, width: int) -> bool:
    """Whether a tensor of a checkpoint is an expert matrix in the published order; `width` is the language model's."""
    if name.endswith(".mlp.experts.gate_up_proj"):
        return tensor.shape[2] != width
    return name.endswith(".mlp.experts.down_proj") and tensor.shape[1] != width


MODEL = Qwen3VLMoeModel
