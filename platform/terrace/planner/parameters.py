"""Parameters per part, in closed form. A test holds that they equal the counts of the model on the meta device exactly."""

from __future__ import annotations

from dataclasses import dataclass

from terrace.families.shapes import ModelShape
from terrace.recipe.schema import PARTS, PartName, Stage
from terrace.recipe.view_heads import head_plan


@dataclass(frozen=True)
class PartSizes:
    """What memory needs of a part's parameters: all of them, those of its largest block, and how many blocks there are."""

    total: int
    block: int
    blocks: int
    unused: int = 0  # of all, those that never train
    smaller: int = 0  # what blocks lack together where they are not equal (dense layers beside sparse ones)

    @property
    def in_blocks(self) -> int:
        return self.block * self.blocks - self.smaller


def part_sizes(shape: ModelShape) -> dict[PartName, PartSizes]:
    vision, language, projector = shape.vision, shape.language, shape.projector
    layer, smaller, unused = _language_blocks(shape)
    embeddings = language.vocabulary * language.width * (1 if language.tied else 2)
    return {
        "vision": PartSizes(
            vision.depth * vision.block_parameters + vision.other_parameters, vision.block_parameters, vision.depth,
            vision.unused_parameters,
        ),
        "projector": PartSizes(projector.parameters, projector.parameters, 1, projector.unused_parameters),
        "language": PartSizes(
            language.layers * layer - smaller + language.width + language.other_biases + embeddings, layer, language.layers, unused, smaller
        ),
    }  # fmt: skip


def _language_blocks(shape: ModelShape) -> tuple[int, int, int]:
    """Parameters of the largest layer, what the other layers lack of it together, and those that never train."""
    language, experts = shape.language, shape.language.experts
    dense = language_layer(shape)
    if experts is None:
        return dense, 0, 0
    router = language.width * experts.count + experts.biases
    sparse = language_layer(shape, experts.count * experts.intermediate + experts.shared) + router
    counts = ((dense, experts.dense_layers), (sparse, language.sparse_layers))
    largest = max(size for size, count in counts if count)
    return largest, sum((largest - size) * count for size, count in counts), experts.biases * language.sparse_layers


def head_parameters(shape: ModelShape, stage: Stage) -> int:
    """Parameters of the heads that the stage trains beside the model (models.heads)."""
    if (options := stage.view_options) is not None:
        return head_plan(options, shape.vision.width).parameters
    if stage.head_kind is None:
        return 0
    kind, count = stage.head_kind
    language, experts = shape.language, shape.language.experts
    if kind == "medusa":
        return count * (language.width**2 + language.vocabulary * language.width)
    block = language_layer(shape)  # that of the model's first layer
    if experts is not None and not experts.dense_layers:
        block = _language_blocks(shape)[0]
    return count * (block + 2 * language.width**2 + 3 * (language.width + language.other_biases))


def active_parameters(shape: ModelShape) -> dict[PartName, int]:
    """Parameters that one token meets: all of them, without the experts that it does not go to."""
    counts, experts = parameter_counts(shape), shape.language.experts
    if experts is not None:
        idle = 3 * shape.language.width * (experts.count - experts.per_token) * experts.intermediate
        counts["language"] -= shape.language.sparse_layers * idle
    return counts


def language_layer(shape: ModelShape, intermediate: int | None = None) -> int:
    """Attention, a feed-forward of this width inside (default: the dense one's) without biases, and two norms of one layer."""
    language = shape.language
    intermediate = language.intermediate if intermediate is None else intermediate
    query, key = language.query_width, language.key_width
    attention = language.attention_matrices
    attention += language.latent.query_rank + language.latent.key_rank if language.latent else 0  # their norms
    attention += query + 2 * key if language.attention_biases else 0
    attention += 2 * language.head_size if language.head_norms else 0
    attention += 2 * (query + key) if language.scaled_heads else 0
    feed_forward = language.feed_forward_matrices * language.width * intermediate
    return attention + feed_forward + language.norms * language.width + language.layer_biases


def parameter_counts(shape: ModelShape) -> dict[PartName, int]:
    """Parameters of each part; a tied embedding counts once, in the language model."""
    return {part: sizes.total for part, sizes in part_sizes(shape).items()}


def trained_parts(stage: Stage) -> list[PartName]:
    return [part for part in PARTS if getattr(stage.train, part) is not None]


def trains_whole(stage: Stage, part: PartName) -> bool:
    """Whether all of the part's own weights train, rather than none, some, or its adapters."""
    training = getattr(stage.train, part)
    return training is not None and training.lora is None and not training.only


def trainable_counts(shape: ModelShape, stage: Stage) -> dict[PartName, int]:
    """Parameters that the stage trains, 0 for frozen parts. `shape` knows the stage's adapters (planner.adapters)."""
    return {
        part: sizes.total - sizes.unused if trains_whole(stage, part) else shape.partly.get(part, shape.adapters_of(part).parameters)
        for part, sizes in part_sizes(shape).items()
    }
