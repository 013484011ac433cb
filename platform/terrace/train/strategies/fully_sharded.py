"""What `fully_shard` needs around it: the groups of a model, the mesh of ranks, and a tensor's part on this rank."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from terrace.errors import InputError, TerraceError
from terrace.models.build import restore_buffers
from terrace.models.parts import transformer_blocks
from terrace.models.precision import DTYPES
from terrace.recipe.schema import Stage
from terrace.worker.context import WorkerContext


def shard(module: Any, model: Any, stage: Stage, context: WorkerContext, free_rest: bool = False) -> None:
    """Make every block and then the rest an FSDP group. `free_rest`: after the forward too, for a model that has no backward."""
    policy = MixedPrecisionPolicy(
        param_dtype=None if stage.precision == "fp32" else DTYPES[stage.precision],
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # rotary angles stay float32; hidden states already have the compute precision
    )
    options: dict[str, Any] = {
        "mesh": mesh_of(stage, context),
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=context.device.startswith("cuda")) if stage.parallel.on_host else OffloadPolicy(),
    }
    for block in transformer_blocks(model):
        fully_shard(block, reshard_after_forward=stage.parallel.reshard_after_forward, **options)
    fully_shard(module, reshard_after_forward=free_rest, **options)


def mesh_of(stage: Stage, context: WorkerContext) -> DeviceMesh:
    """All ranks, or `hybrid_shard_size` neighbours that shard and as many groups of them as replicate."""
    if not dist.is_initialized():  # one process on its own
        backend = "cuda:nccl,cpu:gloo" if context.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    kind = torch.device(context.device).type
    size = stage.parallel.hybrid_shard_size
    if size is None or size >= context.world_size:
        return init_device_mesh(kind, (context.world_size,))
    if context.world_size % size:
        raise InputError(f"parallel.hybrid_shard_size {size} does not divide the {context.world_size} workers")
    return init_device_mesh(kind, (context.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def buffers_to(model: Any, device: torch.device) -> None:
    restore_buffers(model)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def local_of(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Any) -> tuple[int, torch.Tensor]:
    """The first number of this rank's part of a tensor, and that part, flat: whole rows, since groups are split along them."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.detach().view(-1)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise TerraceError(f"a tensor of shape {list(tensor.shape)} is not split along its rows: {tensor.placements}")
    return offset[0] * math.prod(tensor.shape[1:]), tensor.detach().to_local().view(-1)


def whole_of(tensor: Any, device: torch.device) -> torch.Tensor:
    """The whole of a sharded tensor; every rank calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    if device.type == "cpu" and tensor.device_mesh.device_type != "cpu":  # offloaded shards are gathered on the device
        tensor = tensor.to(tensor.device_mesh.device_type)
    return tensor.full_tensor()
