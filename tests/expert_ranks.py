"""Functions that test processes run: what a rank holds and sends when experts are divided."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from expert_steps import SAMPLES, moe_case, train_experts
from families import pack_of
from packs import tiny_recipe

from terrace.models import expert_parallel
from terrace.models.batch import to_device
from terrace.objectives.lm import summed_loss
from terrace.train.setup import prepare_strategy
from terrace.worker.context import WorkerContext


def train_each_family(rank: int, world_size: int, names: list[str], runs: Any, folder: str) -> dict[str, list[list[dict[str, Any]]]]:
    """`expert_steps.train_experts` of several families in the same processes."""
    return {name: train_experts(rank, world_size, name, runs, str(Path(folder) / name)) for name in names}


def count_each_family(rank: int, world_size: int, names: list[str], experts: int, folder: str) -> dict[str, dict[str, Any]]:
    return {name: count_own(rank, world_size, name, experts, str(Path(folder) / name)) for name in names}


def count_own(rank: int, world_size: int, name: str, experts: int, folder: str) -> dict[str, Any]:
    """Of one step: numbers of experts on this rank in weights, gradients and moments and in its shards, and numbers that it sent."""
    case = moe_case(name, Path(folder) / f"tokenizers-{world_size}-{rank}")
    recipe = tiny_recipe(
        model=case.section.model_dump(exclude_none=True), batch={"packs": world_size}, sequence_length=512,
        parallel={"strategy": "ddp", "experts": experts},
    )  # fmt: skip
    context = WorkerContext(rank=rank, world_size=world_size, local_rank=rank)
    sent: list[int] = []
    plain = expert_parallel.exchange_rows

    def counted(rows: Any, received: Any, given: Any, group: Any) -> Any:
        sent.append(rows.numel())
        return plain(rows, received, given, group)

    expert_parallel.exchange_rows = counted
    pack = pack_of(case, [SAMPLES[rank]])
    strategy = prepare_strategy(recipe.model, recipe.stages[0], case.config, context, partial(summed_loss, chunk_tokens=64))
    strategy.accumulate(to_device(pack, "cpu", torch.float32), 1e-3, last=True)
    named = {name: parameter for name, parameter in strategy.model.named_parameters() if parameter.dim() == 3}
    found = {"weights": sum(p.numel() for p in named.values()), "gradients": sum(p.grad.numel() for p in named.values())}
    strategy.clip(1.0)
    strategy.step([(1e-3, 0.0)] * len(strategy._optimizers._groups))
    shards = {kind: [shard for shard in strategy.shards(kind) if len(shard.shape) == 3] for kind in ("weights", "exp_avg")}
    found["moments"] = sum(tensor.numel() for name, tensor in strategy._optimizers.tensors("exp_avg") if name in named)
    found["shards"] = {kind: sum(shard.values.numel() for shard in own) for kind, own in shards.items()}
    found["wholes"] = {shard.name: math.prod(shard.shape) for shard in shards["weights"]}
    return found | {"sent": sum(sent), "tokens": pack.tokens}
