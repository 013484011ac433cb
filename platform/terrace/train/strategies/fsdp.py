"""FSDP2 (`fully_shard`): parameters, gradients and optimizer state are split over ranks, block by block.

Each transformer block of vision and language is gathered when it runs and, with `reshard_after_forward`, freed again;
what is left (embeddings, patch embedding, projector, output layer) forms the root group. Memory per rank: 16 bytes
per trained parameter divided by the ranks, plus the largest blocks in compute precision. bf16 and fp16: shards are
float32 masters, blocks are gathered in compute precision, gradients are reduced in float32.

Accumulation without synchronisation keeps whole float32 gradients on every rank until the last pack of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from terrace.errors import InputError, TerraceError
from terrace.models.build import restore_buffers
from terrace.models.parts import transformer_blocks
from terrace.models.precision import DTYPES
from terrace.models.weights import TensorSource
from terrace.recipe.schema import Stage
from terrace.train.loss_scale import LossScale
from terrace.train.optimizers import Kind, Optimizers, fill_parts
from terrace.train.strategies.interface import Setup, StepModule, scalars_as_vectors
from terrace.train.strategies.shards import Shard, divided
from terrace.worker.context import WorkerContext


class FullyShard:
    """See strategies.interface.Strategy."""

    def __init__(self, setup: Setup) -> None:
        stage, context = setup.stage, setup.context
        self._world_size, self._rank = context.world_size, context.rank
        self._offload_activations = stage.activation_offload
        self.loss_scale = LossScale() if stage.precision == "fp16" else None
        self.model = setup.skeleton
        self._module: Any = StepModule(self.model, setup.loss)
        on_host = "cpu" in (stage.parallel.offload_parameters, stage.parallel.offload_optimizer)
        self._device = torch.device("cpu" if on_host else context.device)
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self._scalars = scalars_as_vectors(self.model)
        _shard(self._module, self.model, stage, context, on_host)
        self.model.to_empty(device=self._device)
        self.model.tie_weights()
        _buffers_to(self.model, torch.device(context.device))
        # The shards, held by name: while a group is gathered, the modules show whole tensors in their place.
        self._parameters: dict[str, Any] = dict(self.model.named_parameters())
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(trainable[name])
        self._fill_weights(setup.source)
        self._trained = [name for group in setup.groups for name in group.names]
        self._optimizers = Optimizers(stage, setup.groups, self._parameters, _part)

    def loss(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self._module(batch)

    def accumulate(self, batch: Any, scale: float, last: bool) -> torch.Tensor:
        factor = scale * self._world_size * (self.loss_scale.value if self.loss_scale else 1.0)
        self._module.set_requires_gradient_sync(last)
        if self._offload_activations:
            with torch.autograd.graph.save_on_cpu(pin_memory=self._device.type == "cuda"):
                loss = self._module(batch)
        else:
            loss = self._module(batch)
        (loss * factor).backward()
        return loss.detach()

    def clip(self, limit: float | None) -> float:
        parameters = [self._parameters[name] for name in self._trained]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.loss_scale:
            for gradient in gradients:
                gradient.mul_(1.0 / self.loss_scale.value)
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if limit is not None and bool(torch.isfinite(norm)):
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    def gradient_square(self) -> float:
        raise NotImplementedError("shards are reduced before they can be measured; the recipe's rules ask for ddp")

    def step(self, learning_rates: list[float]) -> None:
        self._optimizers.step(learning_rates)

    def discard(self) -> None:
        self._optimizers.zero()

    def _held(self, kind: Kind) -> Iterator[tuple[str, Any]]:
        if kind != "weights":
            return self._optimizers.tensors(kind)
        return ((name, parameter.detach()) for name, parameter in self._parameters.items())

    def shards(self, kind: Kind) -> Iterator[Shard]:
        sharded, plain = [], []
        for name, tensor in self._held(kind):
            start, values = _part(tensor)
            shard = Shard(name, () if name in self._scalars else tuple(tensor.shape), start, values)
            (sharded if isinstance(tensor, DTensor) else plain).append(shard)
        yield from divided(sharded, *self._replica)
        yield from divided(plain, self._rank, self._world_size)

    @property
    def _replica(self) -> tuple[int, int]:
        """(number, how many) of the groups of a hybrid strategy, which hold the same shards."""
        mesh = next((p.device_mesh for p in self._parameters.values() if isinstance(p, DTensor)), None)
        return (0, 1) if mesh is None or mesh.ndim == 1 else (mesh.get_local_rank("replicate"), mesh.size(0))

    def tensors(self, kind: Kind) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._held(kind):
            whole = _whole(tensor, self._device)
            yield name, whole.reshape(()) if name in self._scalars else whole

    def optimizer_steps(self) -> dict[str, int]:
        return self._optimizers.steps()

    def state_kinds(self, name: str) -> tuple[Kind, ...]:
        return self._optimizers.kinds(name)

    def load_weights(self, source: TensorSource) -> None:
        self._fill_weights(source)
        self._optimizers.restart_average()

    def _fill_weights(self, source: TensorSource) -> None:
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        fill_parts(self._parameters, source, _part)

    def hold_below(self, name: str, highest: float) -> None:
        with torch.no_grad():
            _local(self._parameters[name]).clamp_(max=highest)

    def load_optimizer(self, source: Callable[[Kind], TensorSource], steps: dict[str, int]) -> None:
        self._optimizers.load(source, steps)

    def load_average(self, source: TensorSource) -> None:
        self._optimizers.load_average(source)


def _shard(module: Any, model: Any, stage: Stage, context: WorkerContext, on_host: bool) -> None:
    """Make every block and then the rest an FSDP group."""
    policy = MixedPrecisionPolicy(
        param_dtype=None if stage.precision == "fp32" else DTYPES[stage.precision],
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # rotary angles stay float32; hidden states already have the compute precision
    )
    options: dict[str, Any] = {
        "mesh": _mesh(stage, context),
        "mp_policy": policy,
        "offload_policy": CPUOffloadPolicy(pin_memory=context.device.startswith("cuda")) if on_host else OffloadPolicy(),
    }
    for block in transformer_blocks(model):
        fully_shard(block, reshard_after_forward=stage.parallel.reshard_after_forward, **options)
    fully_shard(module, reshard_after_forward=False, **options)


def _mesh(stage: Stage, context: WorkerContext) -> DeviceMesh:
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


def _buffers_to(model: Any, device: torch.device) -> None:
    restore_buffers(model)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(tensor: Any) -> tuple[int, torch.Tensor]:
    """The first number of this rank's part of a tensor, and that part, flat: whole rows, since groups are split along them."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.detach().view(-1)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(shape[1:]) != tuple(tensor.shape[1:]):
        raise TerraceError(f"a tensor of shape {list(tensor.shape)} is not split along its rows: {tensor.placements}")
    return offset[0] * math.prod(tensor.shape[1:]), tensor.detach().to_local().view(-1)


def _whole(tensor: Any, device: torch.device) -> torch.Tensor:
    """The whole of a sharded tensor; every rank calls it."""
    if not isinstance(tensor, DTensor):
        return tensor
    if device.type == "cpu" and tensor.device_mesh.device_type != "cpu":  # offloaded shards are gathered on the device
        tensor = tensor.to(tensor.device_mesh.device_type)
    return tensor.full_tensor()
