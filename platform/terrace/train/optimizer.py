"""Parameter groups and the learning-rate schedule, as plain values that every strategy shares.

A group is the parameters of one part and one layer that are decayed alike. Its learning rate at a step is
`part lr * layer_decay^(last layer - layer) * schedule(step)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from terrace.models.families.registry import family_of_model
from terrace.models.lora import is_adapter
from terrace.models.parts import HEADS, has_weight_decay, has_words, last_layers, layer_number
from terrace.recipe.schema import PARTS, PartName, PartTraining, Schedule, Stage
from terrace.recipe.schema_optimizer import Optimizer

Rule = Literal["adamw", "sgd", "lars", "adafactor", "muon"]


Rate = tuple[float, float]  # learning rate and weight decay of a group in a step


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate, a weight decay and a rule of the optimizer."""

    part: PartName | Literal["heads"]
    layer: int
    peak_lr: float
    weight_decay: float
    names: tuple[str, ...]
    rule: Rule = "adamw"
    decay_moves: bool = False  # towards the optimizer's `final_weight_decay`


def parameter_rule(name: str, dimensions: int, stage: Stage) -> Rule:
    """How a parameter is stepped: muon is for matrices that stand between layers, not for embeddings, the output layer or vectors."""
    if stage.optimizer.kind == "muon":
        return "muon" if dimensions == 2 and "embed" not in name and "lm_head" not in name else "adamw"
    return stage.optimizer.kind


def takes_part(name: str, training: PartTraining) -> bool:
    """Whether a parameter of a trained part trains: an adapter where the part has some, or one with a word of `only`."""
    if training.lora is not None:
        return is_adapter(name)
    return not training.only or has_words(name, training.only)


def parameter_groups(model: Any, stage: Stage) -> list[ParameterGroup]:
    """The groups of the stage's trainable parameters, in the order of parts and layers; frozen parts have none, nor have
    tensors that the family never trains, nor the own weights of a part whose adapters train."""
    family, dimensions = family_of_model(model), {name: parameter.dim() for name, parameter in model.named_parameters()}
    names = [name for name in dimensions if not name.startswith(HEADS)]
    depths, unused = last_layers(names, family), set(family.unused(model.config, names))
    collected: dict[tuple[int, int, bool, Rule], list[str]] = {}
    for name in names:
        part = family.part_of(name)
        training = getattr(stage.train, part)
        if training is None or name in unused or not takes_part(name, training):
            continue
        layer = layer_number(name, depths, family) if training.layer_decay < 1 else depths[part]
        rule = parameter_rule(name, dimensions[name], stage)
        collected.setdefault((PARTS.index(part), layer, has_weight_decay(name), rule), []).append(name)
    groups = []
    for name in dimensions if stage.train.heads is not None else ():
        if name.startswith(HEADS):
            rule = parameter_rule(name, dimensions[name], stage)
            collected.setdefault((len(PARTS), 0, has_weight_decay(name), rule), []).append(name)
    for (part_index, layer, decayed, rule), members in sorted(collected.items()):
        part = (*PARTS, "heads")[part_index]
        training = getattr(stage.train, part)
        decay = stage.optimizer.weight_decay if training.weight_decay is None else training.weight_decay
        groups.append(
            ParameterGroup(
                part=part,
                layer=layer,
                peak_lr=training.lr * (training.layer_decay ** (depths[part] - layer) if part != "heads" else 1.0),
                weight_decay=decay if decayed else 0.0,
                names=tuple(members),
                rule=rule,
                decay_moves=decayed and training.weight_decay is None and stage.optimizer.final_weight_decay is not None,
            )
        )
    return groups


def warmup_steps(schedule: Schedule, total_steps: int) -> int:
    """`warmup` below 1 is a share of the steps, from 1 on it is a number of steps."""
    return steps_of(schedule.warmup, total_steps)


def steps_of(length: float, total_steps: int) -> int:
    """A length below 1 is a share of the steps, from 1 on it is a number of steps."""
    return math.ceil(length * total_steps) if length < 1 else int(length)


def schedule_factor(schedule: Schedule, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at step 0, 1, …: linear warm-up, then what `kind` says, down to `min_ratio`."""
    warm = warmup_steps(schedule, total_steps)
    if step < warm:
        return (step + 1) / warm
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "step":
        return schedule.factor ** sum(step >= steps_of(place, total_steps) for place in schedule.milestones)
    start, shape = warm, schedule.kind
    if schedule.kind == "wsd":
        start, shape = max(warm, total_steps - steps_of(schedule.decay, total_steps)), schedule.decay_shape
        if step < start:
            return 1.0
    progress = min(1.0, (step - start) / max(1, total_steps - start - 1))
    falling = {"linear": 1 - progress, "sqrt": 1 - math.sqrt(progress), "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[shape]
    return schedule.min_ratio + (1 - schedule.min_ratio) * falling


def weight_decay_at(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """The optimizer's weight decay in step `step` (from 0): from `weight_decay` to `final_weight_decay` by a cosine."""
    last = optimizer.final_weight_decay
    if last is None:
        return optimizer.weight_decay
    return last + (optimizer.weight_decay - last) * (1 + math.cos(math.pi * step / max(1, total_steps))) / 2


def group_rates(groups: Sequence[ParameterGroup], factor: float, decay: float) -> list[Rate]:
    """Of every group in a step: `factor` of `schedule_factor`, `decay` of `weight_decay_at`."""
    return [(group.peak_lr * factor, decay if group.decay_moves else group.weight_decay) for group in groups]


def part_learning_rates(stage: Stage, factor: float) -> dict[str, float]:
    """Learning rate of each trainable part's top layer, for metrics."""
    return {part: getattr(stage.train, part).lr * factor for part in (*PARTS, "heads") if getattr(stage.train, part) is not None}
