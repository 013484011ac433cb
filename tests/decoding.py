"""A tiny random model that decodes, and prompts for it, with and without images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from packs import segment, tiny_model

from terrace.generation.interface import Prompt
from terrace.models.build import build_model, model_config
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.recipe.schema import Model


def decoding_model() -> Any:
    torch.set_num_threads(1)
    description = Model.model_validate(tiny_model())
    model = build_model(description, model_config(description))
    with torch.no_grad():  # larger weights, so that distributions are far from uniform and prompts matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    use_shared_prompt_attention(model, "sdpa_segments")
    return model


def prompt_of(number: int, images: list[tuple[int, int]]) -> Prompt:
    rng = np.random.default_rng(number)
    ids, _, positions, patches, grids = segment(rng, 5 + 4 * number, images)
    patches_of_image = grids.prod(axis=1)
    inputs = (ids, positions, patches, grids, patches_of_image // 4, patches_of_image)
    return Prompt(*inputs, key=("prompts", number), id=f"prompt-{number}", task="task")


PROMPTS = [prompt_of(0, [(2, 3)]), prompt_of(1, []), prompt_of(2, [(1, 2), (4, 2)])]
