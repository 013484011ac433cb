"""Models of parts with adapters of their own inside, tiny, by name: what the family contract's `terrace_vlm` has not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from families import CONFIGS, Case, case_of

from terrace.families.registry import make_family
from terrace.models.build import model_config
from terrace.recipe.schema import Model

WINDOW_RANKS = {"attention_rank": 3, "mlp_rank": 5}
MODALITY = {"rank": 4, "groups": 2, "temperature": 2.0}
PARTS = CONFIGS["terrace_vlm"]
ADAPTED: dict[str, dict[str, Any]] = {
    "window_adapters": {
        "image_layout": "windows", "window_grid": [2, 3], "window_adapters": WINDOW_RANKS, "vision_feature_layer": -1,
    },
    "modality_adapters": {
        "image_layout": "square", "modality_adapters": MODALITY, "connector": {"kind": "class_tokens", "every": 2, "width": 12},
        "vision_config": PARTS["vision_config"] | {"num_hidden_layers": 5},
    },
}  # fmt: skip


def adapted_config(name: str, **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(PARTS) | ADAPTED[name] | changes


def adapted_case(name: str, folder: Path, **changes: Any) -> Case:
    small = case_of("terrace_vlm", folder)
    section = Model.model_validate({"architecture": "terrace_vlm", "config": adapted_config(name, **changes)})
    family = make_family("terrace_vlm", section.config or {})
    return Case("terrace_vlm", section, family, small.tokenizer, model_config(section, small.tokenizer), small.pixels)
