"""Floating-point operations of one pack, forward and backward, per part. One multiply-add counts two.

Model FLOPs: what the mathematics needs, as `torch.utils.flop_counter` counts it (a test holds 1 %). Attention counts the whole
square of each segment although half of it is masked, which is the convention of that counter and of published MFU figures.
What activation checkpointing computes twice is reported apart.

Backward of a matrix product is two products of the same size: one for its weight's gradient (trained parts only) and one for
its input's gradient (where anything before it trains). So a frozen part costs forward only, or forward and one backward product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from terrace.families.shapes import ModelShape
from terrace.planner.parameters import part_sizes
from terrace.recipe.schema import PARTS, PartName


@dataclass(frozen=True)
class PackLoad:
    """What a pack makes the model do. Sums are over segments or images."""

    tokens: float
    supervised_tokens: float  # rows that meet the output layer
    token_squares: float  # sum of segment length squared
    patches: float
    visual_tokens: float
    pictures: float  # that the tower sees: images, or tiles of them
    image_squares: float  # sum of patches of a picture squared, its class token among them
    window_squares: float  # sum of patches of a window squared
    padding: float = 0.0  # patches around pictures that are embedded and dropped


def exact_load(shape: ModelShape, segments: Sequence[int], pictures: Iterable[tuple[int, int]], supervised_tokens: int) -> PackLoad:
    """The load of a known pack: token counts of its segments, (rows, columns) in patches of the pictures its tower sees.

    A pack without an image runs a blank one (the text-only guard): the caller names its pictures.
    """
    grids = list(pictures)
    areas = [height * width for height, width in grids]
    if shape.vision.tokens_per_picture:  # padded to the largest
        areas = [max(areas)] * len(areas)
    seen = [area + shape.vision.extra_tokens for area in areas]
    return PackLoad(
        tokens=sum(segments),
        supervised_tokens=supervised_tokens,
        token_squares=sum(length * length for length in segments),
        patches=sum(areas),
        visual_tokens=len(areas) * shape.vision.tokens_per_picture or sum(areas) / shape.vision.patches_per_token,
        pictures=len(grids),
        image_squares=sum(area * area for area in seen),
        window_squares=sum(_window_squares(height, width, shape.vision.window) for height, width in grids),
        padding=_padding(grids) if shape.vision.padded else 0.0,
    )


def _padding(grids: Sequence[tuple[int, int]]) -> float:
    """Patches that pictures lack of the smallest rectangle that holds each of them."""
    highest, widest = (max(sides) for sides in zip(*grids))
    return sum(highest * widest - height * width for height, width in grids)


def assumed_load(shape: ModelShape, tokens: float, visual_tokens: float, segment_tokens: float, image_tokens: float) -> PackLoad:
    """The load of a pack of equal segments and equal images; every token that is not visual is supervised."""
    merge = shape.vision.patches_per_token
    patches = max(visual_tokens, 1.0) * merge
    image = min(max(1.0, min(image_tokens, visual_tokens)) * merge, shape.vision.tile_patches or math.inf)
    window = image if shape.vision.window is None else min(image, shape.vision.window**2)
    return PackLoad(
        tokens=tokens,
        supervised_tokens=tokens - visual_tokens,
        token_squares=tokens * min(segment_tokens, tokens),
        patches=patches,
        visual_tokens=patches / merge,
        pictures=patches / image,
        image_squares=patches * image,
        window_squares=patches * window,
    )


def _window_squares(height: int, width: int, window: int | None) -> float:
    """Sum of squared patch counts of an image's windows; those at the right and lower edge may be smaller."""
    if window is None:
        return float((height * width) ** 2)

    def pieces(side: int) -> list[int]:
        return [window] * (side // window) + ([side % window] if side % window else [])

    return float(sum((rows * columns) ** 2 for rows in pieces(height) for columns in pieces(width)))


# ---------------------------------------------------------------- forward


def forward_flops(shape: ModelShape, load: PackLoad) -> dict[PartName, float]:
    """Forward FLOPs of one pack per part."""
    return {part: sum(_forward(shape, load)[part].values()) for part in PARTS}


def _forward(shape: ModelShape, load: PackLoad) -> dict[PartName, dict[str, float]]:
    """Per part: `embed` (no gradient of its input is ever needed), `linear`, `attention`, `head`, and low-rank `adapters`."""
    vision, language = shape.vision, shape.language
    products = 3 if vision.gated else 2
    pictures = 2 * shape.projector.times * (
        load.visual_tokens * shape.projector.products + load.patches * shape.projector.patch_products + shape.projector.once
    )
    windowed = vision.depth - vision.full_blocks
    rows = load.patches + load.pictures * vision.extra_tokens
    squares = vision.full_blocks * load.image_squares + windowed * load.window_squares
    squares -= vision.merged_blocks * load.image_squares * (1 - 1 / vision.merged_patches**2)
    # Of the experts that a token goes to, not of all.
    feed_forward = language.feed_forward_matrices * language.mean_intermediate + language.router_width
    layer = language.attention_matrices + language.width * feed_forward + language.adapter_products
    matrices = vision.width * (4 * vision.width + products * vision.intermediate) + vision.adapter_products
    idle = vision.idle_blocks / max(1, vision.depth)
    adapters = {
        "vision": 2 * rows * shape.adapters_of("vision").parameters,
        "projector": 2 * load.visual_tokens * shape.projector.times * shape.adapters_of("projector").parameters,
        "language": 2 * load.tokens * shape.adapters_of("language").parameters,
    }
    return {
        "vision": {
            "adapters": adapters["vision"],
            "embed": 2 * (load.patches + load.padding) * vision.patch_values * vision.width,
            "linear": 2 * rows * vision.whole_blocks * matrices + 2 * load.patches * vision.merger_products,
            "attention": 4 * vision.width * (squares * (1 - idle) + load.patches * vision.merger_keys),
            "idle": 2 * rows * vision.idle_blocks * matrices + 4 * vision.width * squares * idle,  # forward only
        },
        "projector": {
            "adapters": adapters["projector"],
            "embed" if shape.projector.first else "linear": pictures,
            "between": 2 * load.tokens * shape.projector.text_products,  # layers that stand between those of the language model
        },
        "language": {
            "adapters": adapters["language"],
            "linear": 2 * load.tokens * language.layers * layer,
            "attention": 2 * (language.query_width + language.value_width) * language.layers * load.token_squares,
            "head": 2 * load.supervised_tokens * (language.width * language.vocabulary + language.head_products),
        },
    }


# ---------------------------------------------------------------- a training step


@dataclass(frozen=True)
class PackFlops:
    """FLOPs of one pack per part. `recompute` is what activation checkpointing adds in hardware, not part of the model's."""

    forward: dict[PartName, float]
    backward: dict[PartName, float]
    recompute: dict[PartName, float]

    @property
    def model(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def hardware(self) -> float:
        return self.model + sum(self.recompute.values())


def training_flops(shape: ModelShape, load: PackLoad, trained: Sequence[PartName], checkpointed: Sequence[PartName] = ()) -> PackFlops:
    """FLOPs of forward and backward of one pack when `trained` parts train and the others are frozen."""
    forward = _forward(shape, load)
    backward: dict[PartName, float] = {}
    for place, part in enumerate(PARTS):
        adapters = shape.adapters_of(part).parameters
        weights = float(part in trained and not adapters)  # gradients of this part's weights, or a share of them
        if part in shape.partly:
            weights = shape.partly[part] / part_sizes(shape)[part].total
        inputs = part in trained or any(before in trained for before in PARTS[:place])  # of what comes into it
        linear = forward[part].get("linear", 0.0) + forward[part].get("head", 0.0)
        backward[part] = (
            linear * (weights + inputs)
            + forward[part].get("attention", 0.0) * 2 * inputs  # two products forward, four backward
            + forward[part].get("embed", 0.0) * weights
            + forward[part].get("adapters", 0.0) * 2
            + forward[part].get("between", 0.0) * (weights + bool(trained))  # what comes in goes through norms that train
        )
    in_place = 2 * load.visual_tokens * shape.projector.in_place  # of the language model's work, with the projector's weights
    backward["projector"] += in_place * ("projector" in trained)
    backward["language"] -= in_place * ("language" in trained and not shape.adapters_of("language").parameters)
    if shape.projector.enters and "language" not in trained:  # in front of the first layer that reads pictures
        unreached = shape.projector.enters / shape.language.layers * any(part in trained for part in PARTS[:2])
        backward["language"] -= unreached * (forward["language"]["linear"] + 2 * forward["language"]["attention"])
    if "projector" in trained and "vision" not in trained:  # what the tower gives takes no gradient
        backward["projector"] -= 2 * (load.visual_tokens * shape.projector.outer + load.patches * shape.projector.patch_outer)
    recompute = {
        part: sum(forward[part].get(kind, 0.0) for kind in ("linear", "attention")) if part in checkpointed else 0.0 for part in PARTS
    }
    return PackFlops({part: sum(forward[part].values()) for part in PARTS}, backward, recompute)
