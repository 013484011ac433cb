"""Flamingo with torch: Idefics, whose resampler is told how many frames each video has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from terrace.models.batch import ImageFacts
from terrace.models.families.idefics import IdeficsModel
from terrace.models.families.interface import Features
from terrace.models.families.own_code import files_of
from terrace.models.modules.configuration_flamingo import FlamingoConfig
from terrace.models.modules.modeling_flamingo import FlamingoForConditionalGeneration

AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)
AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)


TIMES = "model.perceiver_resampler.times"


class FlamingoModel(IdeficsModel):
    code: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "configuration_flamingo.FlamingoConfig",
        "AutoModelForImageTextToText": "modeling_flamingo.FlamingoForConditionalGeneration",
    }

    def initial(self, name: str, config: Any, shape: torch.Size) -> torch.Tensor | None:
        """The class, which is transformers' but for this tensor, draws it like the latents beside it."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)) if name == TIMES else None

    def may_be_new(self, name: str) -> bool:
        return name == TIMES

    def code_files(self) -> list[Path]:
        return files_of(self.code.values())

    def features(self, model: Any, values: torch.Tensor, images: ImageFacts) -> Features:
        seen = model.model.vision_model(**self.inputs(values, images)).last_hidden_state
        return Features(model.model.perceiver_resampler(seen, images.facts[:, 0].tolist()))


MODEL = FlamingoModel
