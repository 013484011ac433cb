"""What dividing experts over workers (`parallel.experts`) takes from a worker's memory and adds to what it sends."""

from __future__ import annotations

from terrace.families.shapes import ModelShape
from terrace.recipe.schema import Stage


def experts_elsewhere(shape: ModelShape, stage: Stage) -> int:
    """Parameters of experts that a worker does not hold."""
    ranks, experts, language = stage.parallel.experts, shape.language.experts, shape.language
    if experts is None or ranks == 1:
        return 0
    held_by_all = 3 * language.width * experts.intermediate * experts.count * language.sparse_layers
    return held_by_all * (ranks - 1) // ranks


def exchange_numbers(shape: ModelShape, stage: Stage, tokens: float) -> float:
    """Numbers that a worker sends others in the forward pass of so many tokens, of a router that likes all experts alike; backward sends as
    many, and so does a forward pass that is made again."""
    ranks, experts, language = stage.parallel.experts, shape.language.experts, shape.language
    if experts is None or ranks == 1:
        return 0.0
    return 2 * experts.per_token * tokens * language.width * language.sparse_layers * (ranks - 1) / ranks


def exchange_bytes(shape: ModelShape, stage: Stage, workers: int, tokens: float, compute: int) -> float:
    """Bytes that a worker sends others in a step, whose packs hold so many tokens each."""
    train = stage.train.language
    again = train.activation_checkpointing if train else stage.frozen_activation_checkpointing
    packs = stage.batch.packs * stage.parallel.sequence_parallel / workers
    return compute * packs * exchange_numbers(shape, stage, tokens) * (3 if again else 2)


def exchange_buffers(shape: ModelShape, stage: Stage, tokens: float, compute: int) -> float:
    """Bytes of a layer at work beyond what it keeps anyway: its rows on the way out and in, and their answers."""
    experts = shape.language.experts
    if experts is None or stage.parallel.experts == 1:
        return 0.0
    return 4 * compute * experts.per_token * tokens * shape.language.width
