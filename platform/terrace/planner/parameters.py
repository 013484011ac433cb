"""Parameters per part, in closed form. A test holds that they equal the counts of the model on the meta device exactly."""

from __future__ import annotations

from dataclasses import dataclass

from terrace.families.shapes import ModelShape
from terrace.recipe.schema import PARTS, PartName, Stage


@dataclass(frozen=True)
class PartSizes:
    """What memory needs of a part's parameters: all of them, those of one repeated block, and how many blocks there are."""

    total: int
    block: int
    blocks: int
    unused: int = 0  # of all, those that never train


def part_sizes(shape: ModelShape) -> dict[PartName, PartSizes]:
    vision, language, projector = shape.vision, shape.language, shape.projector
    layer = language_layer(shape)
    embeddings = language.vocabulary * language.width * (1 if language.tied else 2)
    return {
        "vision": PartSizes(
            vision.depth * vision.block_parameters + vision.other_parameters, vision.block_parameters, vision.depth,
            vision.unused_parameters,
        ),
        "projector": PartSizes(projector.parameters, projector.parameters, 1, projector.unused_parameters),
        "language": PartSizes(language.layers * layer + language.width + embeddings + language.other_parameters, layer, language.layers),
    }  # fmt: skip


def language_layer(shape: ModelShape) -> int:
    """Attention, feed-forward and two norms of one layer."""
    language = shape.language
    if language.layer_parameters is not None:
        return language.layer_parameters
    query, key = language.query_width, language.key_width
    attention = language.width * (query + 2 * key) + query * language.width
    attention += query + 2 * key if language.attention_biases else 0
    attention += 2 * language.head_size if language.head_norms else 0
    return attention + 3 * language.width * language.intermediate + 2 * language.width


def parameter_counts(shape: ModelShape) -> dict[PartName, int]:
    """Parameters of each part; a tied embedding counts once, in the language model."""
    return {part: sizes.total for part, sizes in part_sizes(shape).items()}


def trained_parts(stage: Stage) -> list[PartName]:
    return [part for part in PARTS if getattr(stage.train, part) is not None]


def trains_whole(stage: Stage, part: PartName) -> bool:
    """Whether the part's own weights train, rather than nothing or its adapters."""
    training = getattr(stage.train, part)
    return training is not None and training.lora is None


def trainable_counts(shape: ModelShape, stage: Stage) -> dict[PartName, int]:
    """Parameters that the stage trains, 0 for frozen parts. `shape` knows the stage's adapters (planner.adapters)."""
    return {
        part: sizes.total - sizes.unused if trains_whole(stage, part) else shape.adapters_of(part).parameters
        for part, sizes in part_sizes(shape).items()
    }
