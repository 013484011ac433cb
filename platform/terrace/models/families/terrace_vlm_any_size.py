"""A model of parts that sees slices, with torch: what it is told beside the pixels, and its export's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from terrace.families.terrace_vlm_any_size import PROCESSOR_FILE
from terrace.models.batch import ImageFacts
from terrace.models.families.minicpmv4_6 import patches_side_by_side
from terrace.models.families.own_code import files_of
from terrace.models.families.terrace_vlm import TerraceVlmFamily
from terrace.models.modules.configuration_terrace_vlm_any_size import TerraceVlmAnySizeConfig
from terrace.models.modules.modeling_terrace_vlm_any_size import TerraceVlmAnySizeForConditionalGeneration

AutoConfig.register(TerraceVlmAnySizeConfig.model_type, TerraceVlmAnySizeConfig, exist_ok=True)
AutoModelForImageTextToText.register(TerraceVlmAnySizeConfig, TerraceVlmAnySizeForConditionalGeneration, exist_ok=True)


class TerraceVlmAnySizeFamily(TerraceVlmFamily):
    code: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "configuration_terrace_vlm_any_size.TerraceVlmAnySizeConfig",
        "AutoModelForImageTextToText": "modeling_terrace_vlm_any_size.TerraceVlmAnySizeForConditionalGeneration",
    }

    def code_files(self) -> list[Path]:
        return files_of([*self.code.values(), PROCESSOR_FILE])

    def language_positions(self, positions: torch.Tensor) -> torch.Tensor:
        return positions[-1]  # the row that says those of the text, where there are two

    def inputs(self, values: torch.Tensor, images: ImageFacts) -> dict[str, Any]:
        return patches_side_by_side(self.family, values, images)


MODEL = TerraceVlmAnySizeFamily
