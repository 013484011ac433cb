"""Parameters per part, in closed form. A test holds that they equal the counts of the model on the meta device exactly."""

from __future__ import annotations

from dataclasses import dataclass

from terrace.planner.shapes import PATCH_VALUES, ModelShape
from terrace.recipe.schema import PARTS, PartName, Stage


@dataclass(frozen=True)
class PartSizes:
    """What memory needs of a part's parameters: all of them, those of one repeated block, and how many blocks there are."""

    total: int
    block: int
    blocks: int


def part_sizes(shape: ModelShape) -> dict[PartName, PartSizes]:
    vision, language = shape.vision, shape.language
    block = vision_block(shape)
    layer = language_layer(shape)
    embeddings = language.vocabulary * language.width * (1 if language.tied else 2)
    norm = vision.width if vision.gated else 2 * vision.width
    merged = shape.merged_width
    projector = norm + merged * merged + merged + merged * language.width + language.width
    return {
        "vision": PartSizes(vision.depth * block + PATCH_VALUES * vision.width, block, vision.depth),
        "projector": PartSizes(projector, projector, 1),
        "language": PartSizes(language.layers * layer + language.width + embeddings, layer, language.layers),
    }


def vision_block(shape: ModelShape) -> int:
    """Attention (qkv and output, with biases), feed-forward and two norms of one vision block."""
    width, inner = shape.vision.width, shape.vision.intermediate
    attention = 4 * width * width + 4 * width
    if shape.vision.gated:
        return attention + 3 * width * inner + 2 * inner + width + 2 * width
    return attention + 2 * width * inner + inner + width + 4 * width


def language_layer(shape: ModelShape) -> int:
    """Attention (biases on query, key and value only), feed-forward without biases and two norms of one layer."""
    language = shape.language
    query, key = language.query_width, language.key_width
    attention = language.width * (query + 2 * key) + query + 2 * key + query * language.width
    return attention + 3 * language.width * language.intermediate + 2 * language.width


def parameter_counts(shape: ModelShape) -> dict[PartName, int]:
    """Parameters of each part; a tied embedding counts once, in the language model."""
    return {part: sizes.total for part, sizes in part_sizes(shape).items()}


def trained_parts(stage: Stage) -> list[PartName]:
    return [part for part in PARTS if getattr(stage.train, part) is not None]


def trainable_counts(shape: ModelShape, stage: Stage) -> dict[PartName, int]:
    """Parameters that the stage trains, 0 for frozen parts."""
    trained = trained_parts(stage)
    return {part: count if part in trained else 0 for part, count in parameter_counts(shape).items()}
