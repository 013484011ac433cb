"""Parameter groups and the learning-rate schedule, as plain values that every strategy shares.

A group is the parameters of one part and one layer that are decayed alike. Its learning rate at a step is
`part lr * layer_decay^(last layer - layer) * schedule(step)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from terrace.models.families.registry import family_of_model
from terrace.models.lora import is_adapter
from terrace.models.parts import has_weight_decay, last_layers, layer_number
from terrace.recipe.schema import PARTS, PartName, Schedule, Stage


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    part: PartName
    layer: int
    peak_lr: float
    weight_decay: float
    names: tuple[str, ...]


def parameter_groups(model: Any, stage: Stage) -> list[ParameterGroup]:
    """The groups of the stage's trainable parameters, in the order of parts and layers; frozen parts have none, nor have
    tensors that the family never trains, nor the own weights of a part whose adapters train."""
    family, names = family_of_model(model), [name for name, _ in model.named_parameters()]
    depths, unused = last_layers(names, family), set(family.unused(model.config, names))
    collected: dict[tuple[int, int, bool], list[str]] = {}
    for name in names:
        part = family.part_of(name)
        training = getattr(stage.train, part)
        if training is None or name in unused or (training.lora is not None and not is_adapter(name)):
            continue
        layer = layer_number(name, depths, family) if training.layer_decay < 1 else depths[part]
        collected.setdefault((PARTS.index(part), layer, has_weight_decay(name)), []).append(name)
    groups = []
    for (part_index, layer, decayed), members in sorted(collected.items()):
        part = PARTS[part_index]
        training = getattr(stage.train, part)
        decay = stage.optimizer.weight_decay if training.weight_decay is None else training.weight_decay
        groups.append(
            ParameterGroup(
                part=part,
                layer=layer,
                peak_lr=training.lr * training.layer_decay ** (depths[part] - layer),
                weight_decay=decay if decayed else 0.0,
                names=tuple(members),
            )
        )
    return groups


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """`warmup` below 1 is a share of the steps, from 1 on it is a number of steps."""
    return math.ceil(schedule.warmup * total_steps) if schedule.warmup < 1 else int(schedule.warmup)


def schedule_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at step 0, 1, …: linear warm-up, then cosine, linear or constant to `min_ratio`."""
    warm = warmup_steps(schedule, total_steps)
    if step < warm:
        return (step + 1) / warm
    if schedule.kind == "constant":
        return 1.0
    progress = min(1.0, (step - warm) / max(1, total_steps - warm - 1))
    falling = (1 - progress) if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.min_ratio + (1 - schedule.min_ratio) * falling


def part_learning_rates(stage: Stage, factor: float) -> dict[str, float]:
    """Learning rate of each trainable part's top layer, for metrics."""
    return {part: getattr(stage.train, part).lr * factor for part in PARTS if getattr(stage.train, part) is not None}
