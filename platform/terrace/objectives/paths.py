"""Stochastic depth in an objective over pictures: the factors of a pack, and the tower run with them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from terrace.data.types import PackedExample
from terrace.families.configurations import vision_config
from terrace.models.dropped_paths import paths_of
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_of_model
from terrace.objectives.chance import kept_paths
from terrace.objectives.interface import Opening


def drawn_paths(
    opening: Opening, family: FamilyModel, example: PackedExample, epochs: Sequence[int], views: int
) -> torch.Tensor | None:
    """float32 [views, B, L, 2] on the device, of the pictures of a pack; None where the stage leaves no branch out."""
    training = opening.stage.train.vision
    if training is None or not training.drop_path or not example.sample_ids:
        return None
    layers = int(vision_config(opening.feed.config).num_hidden_layers)
    kept = kept_paths(opening.stage.seed, example.sources, example.sample_ids, epochs, views, layers, training.drop_path)
    return torch.from_numpy(kept).to(opening.context.device)


def running_paths(model: Any, factors: torch.Tensor | None, first: bool) -> contextlib.AbstractContextManager[None]:
    """While it lasts, rows that go through the tower have these factors [R, L, 2]. `first` of a batch: those of the last one are over."""
    if factors is None:
        return contextlib.nullcontext()
    paths = paths_of(model, family_of_model(model).blocks_of(model, "vision"))
    if first:
        paths.forget()
    return paths.running(factors)
