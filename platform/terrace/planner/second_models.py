"""Models beside the one that trains: the reference of a KL term, and the weights of a rollout engine.

A reference is held as the strategy holds weights: divided by the ranks under fsdp and zero3, else whole. An engine decodes with whole
weights: the native one with those of the model that trains where a rank has them whole, else with a copy (linear layers in the stage's
precision, the rest float32) that is there while it generates; one that generates while the model trains has it always. A copy that is
divided by the ranks as well (grpo.shard_copy) has each layer whole while it runs.
"""

from __future__ import annotations

from terrace.families.shapes import ModelShape
from terrace.planner.parameters import part_sizes
from terrace.recipe.schema import Stage
from terrace.recipe.schema_grpo import GrpoOptions

FP32 = 4
SHARDED = ("fsdp", "zero3")


def second_model_bytes(shape: ModelShape, stage: Stage, shards: int, compute: int) -> float:
    """Bytes on one GPU while a step is made, beside the stage's own weights. `shards`: the ranks that a sharded model is divided by."""
    if stage.objective != "grpo":
        return 0.0
    options = stage.grpo or GrpoOptions()
    held = 0.0
    if options.kl_coefficient > 0:
        held += FP32 * _parameters(shape) / (shards if stage.parallel.strategy in SHARDED else 1)
    return held + (copy_bytes(shape, compute) if has_copy(stage) and overlapped(options) else 0.0)


def has_copy(stage: Stage) -> bool:
    """Whether the native engine decodes, beside the model that trains, with weights of its own."""
    options = stage.grpo or GrpoOptions()
    beside = options.engine == "native" and options.placement == "colocated"
    return stage.objective == "grpo" and beside and (stage.parallel.strategy in SHARDED or overlapped(options))


def can_be_divided(stage: Stage) -> bool:
    """Whether the copy may be in shards: all ranks decode at the same time then, which rounds see to."""
    options = stage.grpo or GrpoOptions()
    return has_copy(stage) and stage.parallel.strategy in SHARDED and options.rollout == "rounds"


def copy_bytes(shape: ModelShape, compute: int, shards: int = 1) -> float:
    """Weights of a native engine: what linear layers read in compute precision, embeddings in float32. On more than one shard with the
    layer that is the largest."""
    embeddings = shape.language.vocabulary * shape.language.width
    whole = compute * (_parameters(shape) - embeddings) + FP32 * embeddings
    if shards == 1:
        return whole
    return whole / shards + max(FP32 * embeddings, compute * max(size.block for size in part_sizes(shape).values()))


def overlapped(options: GrpoOptions) -> bool:
    return options.overlap is not None and options.overlap.max_staleness > 0


def _parameters(shape: ModelShape) -> float:
    return sum(size.total for size in part_sizes(shape).values())
