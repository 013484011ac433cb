"""A teacher: the tower and its heads as a running average of those that train.

    teacher = m teacher + (1 - m) student   after every optimizer step, m rising from `momentum` to `final_momentum` by a cosine

It begins as a copy of the student. Every rank holds it whole in float32, whatever the strategy does with the student: 4 bytes for each
parameter of tower and heads, and under strategies that split weights one gather of them in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from terrace.models.attention import use_attention
from terrace.models.build import meta_model, restore_buffers
from terrace.models.families.registry import family_of_model
from terrace.models.parts import HEADS
from terrace.models.view_heads import attach_view_heads, tower_width
from terrace.recipe.schema_views import Momentum, Projector

NAME = "teacher."  # of its tensors in checkpoints


def momentum_at(options: Momentum, step: int, steps: int) -> float:
    """The share that stays in step `step` (from 0) of `steps`."""
    gap = options.final_momentum - options.momentum
    return options.final_momentum - gap * (math.cos(math.pi * step / max(1, steps)) + 1) / 2


class Teacher:
    def __init__(self, objective: str, options: Projector, config: Any, device: str) -> None:
        self.model = meta_model(config)
        self._family = family_of_model(self.model)
        attach_view_heads(self.model, objective, options, tower_width(config))
        self.model.heads.predictor = None
        use_attention(self.model, "sdpa")
        for module in (self._family.vision(self.model), self.model.heads):
            module.to_empty(device=device)
            restore_buffers(module)
        self.model.requires_grad_(False).eval()
        self.tensors = {
            name: parameter for name, parameter in self.model.named_parameters()
            if name.startswith(HEADS) or self._family.part_of(name) == "vision"
        }  # fmt: skip

    def features(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """[B, T, W] of T normalised views [B, 3, s, s]."""
        with torch.no_grad():
            return torch.stack([self._family.view_features(self.model, view) for view in views], dim=1)

    def follow(self, weights: Iterator[tuple[str, torch.Tensor]], momentum: float) -> None:
        """`weights` are the student's, whole. A momentum of 0 makes a copy."""
        with torch.no_grad():
            for name, tensor in weights:
                if name in self.tensors:
                    own = self.tensors[name]
                    own.mul_(momentum).add_(tensor.to(own), alpha=1.0 - momentum)

    def copy(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in weights:
                if name in self.tensors:
                    self.tensors[name].copy_(tensor)

    def load(self, source: Callable[[str], torch.Tensor]) -> None:
        """From a checkpoint, by the names of `state`."""
        self.copy((name, source(NAME + name)) for name in self.tensors)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((NAME + name, tensor) for name, tensor in self.tensors.items())
