"""A model that never trains, beside the one that does: the reference of a KL term. It is held as its strategy holds weights.

Where every rank holds whole weights (ddp, ZeRO-1 and 2) it is whole as well, float32 under autocast. Where none does (fsdp, ZeRO-3) it is
sharded by `fully_shard` over the same ranks: 4 bytes per parameter divided by the ranks, plus the block that runs, gathered in compute
precision and freed again. Under ZeRO-3 as well: DeepSpeed's own hooks would come with an engine that wants an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from terrace.models.build import materialise
from terrace.models.precision import compute_context
from terrace.models.weights import TensorSource
from terrace.recipe.schema import Stage
from terrace.train.optimizers import fill_parts
from terrace.train.strategies.fully_sharded import buffers_to, part_of, shard
from terrace.train.strategies.interface import FrozenLoss, Loss, StepModule, scalars_as_vectors
from terrace.train.strategies.shards import ReadTogether
from terrace.worker.context import WorkerContext


def whole_loss(skeleton: Any, source: TensorSource, loss: Loss, stage: Stage, context: WorkerContext) -> FrozenLoss:
    """`loss` of a whole model; each byte of the source is read by one rank."""
    together = ReadTogether(source, [name for name, _ in skeleton.named_parameters()], context)
    model = materialise(skeleton, together, context.device).eval().requires_grad_(False)

    def of(batch: Any) -> torch.Tensor:
        with torch.no_grad(), compute_context(stage.precision, context.device):
            return loss(model, batch)

    return of


def sharded_loss(skeleton: Any, source: TensorSource, loss: Loss, stage: Stage, context: WorkerContext) -> FrozenLoss:
    """`loss` of a model of which each rank holds its part; each reads that alone."""
    skeleton.eval().requires_grad_(False)
    module: Callable[[Any], torch.Tensor] = StepModule(skeleton, loss)
    scalars_as_vectors(skeleton)
    shard(module, skeleton, stage, context, free_rest=True)
    skeleton.to_empty(device="cpu" if stage.parallel.on_host else context.device)
    skeleton.tie_weights()
    buffers_to(skeleton, torch.device(context.device))
    skeleton.requires_grad_(False)
    fill_parts(dict(skeleton.named_parameters()), source, part_of)

    def of(batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return module(batch)

    return of
