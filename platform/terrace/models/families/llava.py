"""LLaVA with torch: transformers' usual names; what lies behind the tower's feature layer never trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from terrace.families.llava import idle_blocks
from terrace.models.families.interface import FamilyModel


class LlavaModel(FamilyModel):
    def unused(self, config: Any, names: Iterable[str]) -> list[str]:
        depth = config.vision_config.num_hidden_layers
        first = depth - idle_blocks(config.to_dict())
        behind = [f"{self.blocks['vision']}.{number}." for number in range(first, depth)]
        return [name for name in names if name.startswith((*behind, "model.vision_tower.post_layernorm."))]


MODEL = LlavaModel
