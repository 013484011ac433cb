"""Heads of the objectives over views, as one module `heads` of a model: projector, predictor, prototypes, context.

Parameters are named `heads.…` and belong to none of the model's parts. A norm over the batch keeps no running figures: its batch is one
view of the whole global batch, which every rank has before it (objectives.self_supervised).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from terrace.families.configurations import vision_config
from terrace.recipe.schema_views import Projector
from terrace.recipe.view_heads import HeadPlan, Layers, head_plan

KIND = "views"
RECTIFIERS = {"relu": nn.ReLU, "gelu": nn.GELU}


class HeadLinear(nn.Linear):
    """Starts as PyTorch's own linear layers do, whatever the class of the model around it does with its layers."""

    def reset_own_parameters(self) -> None:
        self.reset_parameters()


class SmallLinear(nn.Linear):
    """Starts as DINO's published layers do. PyTorch's own biases are as large as what its weights say of a picture: after three such
    layers without a norm all pictures look alike."""

    def reset_own_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Rows(HeadLinear):
    """Prototypes: rows that vectors are compared with by cosine, so that their lengths say nothing."""

    def forward(self, vectors: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """Cosines [..., rows] of vectors of length 1, in their precision. `frozen`: no gradient goes to the rows."""
        weight = (self.weight.detach() if frozen else self.weight).to(vectors.dtype)
        return F.linear(vectors, F.normalize(weight, dim=-1))


class BatchNorm(nn.BatchNorm1d):
    """Of one row nothing is left but the shift."""

    def __init__(self, width: int, affine: bool) -> None:
        super().__init__(width, affine=affine, track_running_stats=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > 1:
            return super().forward(rows)
        return 0.0 * rows if self.bias is None else 0.0 * rows * self.weight + self.bias


class Recurrent(nn.GRU):
    def reset_own_parameters(self) -> None:
        self.reset_parameters()


def mlp(plan: Layers) -> nn.Sequential:
    """[., first width] -> [., last width]."""
    layers: list[nn.Module] = []
    count = len(plan.widths) - 1
    for number in range(count):
        last = number == count - 1
        normed = plan.norm != "none" and (plan.final_norm or not last)
        width = plan.widths[number + 1]
        linear = SmallLinear if plan.small_start else HeadLinear
        layers.append(linear(plan.widths[number], width, bias=not normed))
        if normed and plan.norm == "batch":
            layers.append(BatchNorm(width, affine=not last))
        elif normed:
            layers.append(nn.LayerNorm(width, elementwise_affine=not last))
        if not last:
            layers.append(RECTIFIERS[plan.rectifier]())
    return nn.Sequential(*layers)


class ViewHeads(nn.Module):
    """What stands behind the tower of one objective. `settings` describe it in a file."""

    kind = KIND

    def __init__(self, objective: str, options: Projector, width: int) -> None:
        super().__init__()
        plan: HeadPlan = head_plan(options, width)
        self.settings: dict[str, Any] = {"objective": objective, "width": width, **options.model_dump(mode="json")}
        self.projector = mlp(plan.projector)
        self.predictor = mlp(plan.predictor) if plan.predictor is not None else None
        self.prototypes = Rows(plan.projector.widths[-1], plan.prototypes, bias=False) if plan.prototypes else None
        self.context, self.maps = None, None
        if plan.context is not None:
            inner, ahead = plan.context
            self.context = Recurrent(plan.projector.widths[-1], inner, batch_first=True)
            self.maps = HeadLinear(inner, ahead * plan.projector.widths[-1], bias=False)

    def projected(self, features: torch.Tensor) -> torch.Tensor:
        """[N, V, D] of features [N, V, W], each view a batch of its own."""
        return torch.stack([self.projector(view) for view in features.to(self.projector[0].weight.dtype).unbind(1)], dim=1)

    def predicted(self, projected: torch.Tensor) -> torch.Tensor:
        """[N, V, D] of projected ones."""
        return torch.stack([self.predictor(view) for view in projected.unbind(1)], dim=1)


def attach_view_heads(model: Any, objective: str, options: Projector, width: int) -> None:
    """Put heads into a skeleton; memory and weights come with the model's."""
    with torch.device("meta"):
        model.heads = ViewHeads(objective, options, width)


def tower_width(config: Any) -> int:
    """Width of what the tower of a model says of a picture."""
    return int(vision_config(config).hidden_size)
