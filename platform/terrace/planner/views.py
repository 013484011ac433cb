"""What objectives over views make of a picture: how many patches the tower sees of it, and what a teacher costs beside.

A teacher runs forward only, which is a third of a training pass; its tower and heads stand in float32 on every GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from terrace.data.views.plans import single_views
from terrace.families.shapes import ModelShape
from terrace.planner.parameters import head_parameters, part_sizes
from terrace.recipe.schema import Stage
from terrace.recipe.schema_views import ByolOptions, CpcOptions, DinoOptions, MocoOptions

FORWARD = 1 / 3  # of a training pass


def seen_patches(stage: Stage, shape: ModelShape) -> Iterator[tuple[float, float]]:
    """(patches, share of a training pass that it runs) of every view of a picture; of the whole picture where none are compared."""
    options, whole = stage.view_options, float(shape.vision.patches_per_token)
    if options is None:
        yield whole, 1.0
        return
    patch = math.sqrt(shape.vision.patch_values / 3)
    views = [whole if view.side is None else (view.side / patch) ** 2 for view in single_views(stage.planned_views)]
    if isinstance(options, CpcOptions):
        views = [views[0] * 4 / (options.grid + 1) ** 2] * options.grid**2
    queued = isinstance(options, MocoOptions) and options.queue > 0
    for patches in views[:1] if queued else views:
        yield patches, 1.0
    for patches in (views[1:2] if queued else views[:2]) if has_teacher(stage) else ():
        yield patches, FORWARD


def has_teacher(stage: Stage) -> bool:
    return isinstance(stage.view_options, MocoOptions | ByolOptions | DinoOptions)


def kept_pictures(stage: Stage, shape: ModelShape) -> float:
    """Whole pictures' worth of patches that training keeps activations of, for each picture of a pack."""
    return sum(patches for patches, share in seen_patches(stage, shape) if share == 1.0) / shape.vision.patches_per_token


def teacher_parameters(shape: ModelShape, stage: Stage) -> int:
    """Of the tower and its heads, predictors and all."""
    return part_sizes(shape)["vision"].total + head_parameters(shape, stage) if has_teacher(stage) else 0
