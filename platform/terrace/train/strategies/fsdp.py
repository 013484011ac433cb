"""FSDP2 (`fully_shard`): parameters, gradients and optimizer state are split over ranks, block by block.

Each transformer block of vision and language is gathered when it runs and, with `reshard_after_forward`, freed again;
what is left (embeddings, patch embedding, projector, output layer) forms the root group. Memory per rank: 16 bytes
per trained parameter divided by the ranks, plus the largest blocks in compute precision. bf16 and fp16: shards are
float32 masters, blocks are gathered in compute precision, gradients are reduced in float32.

Accumulation without synchronisation keeps whole float32 gradients on every rank until the last pack of a step, unless they are reduced at
every pack (`parallel.reduce_every_pack`); of a hybrid strategy the groups of replicas then still exchange theirs once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from terrace.models.weights import TensorSource
from terrace.train.loss_scale import LossScale
from terrace.train.optimizer import Rate
from terrace.train.optimizers import Kind, Optimizers, fill_parts
from terrace.train.strategies.frozen import sharded_loss
from terrace.train.strategies.fully_sharded import buffers_to, local_of, part_of, shard, whole_of
from terrace.train.strategies.interface import FrozenLoss, Loss, Setup, StepModule, scalars_as_vectors
from terrace.train.strategies.shards import Shard, divided


class FullyShard:
    """See strategies.interface.Strategy."""

    def __init__(self, setup: Setup) -> None:
        stage, context = setup.stage, setup.context
        self._stage, self._context = stage, context
        self._world_size, self._rank = context.world_size, context.rank
        self._offload_activations, self._reduce_every_pack = stage.activation_offload, bool(stage.parallel.reduce_every_pack)
        self.loss_scale = LossScale() if stage.precision == "fp16" else None
        self.model = setup.skeleton
        self._module: Any = StepModule(self.model, setup.loss)
        self._device = torch.device("cpu" if stage.parallel.on_host else context.device)
        trainable = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self._scalars = scalars_as_vectors(self.model)
        shard(self._module, self.model, stage, context)
        self.model.to_empty(device=self._device)
        self.model.tie_weights()
        buffers_to(self.model, torch.device(context.device))
        # The shards, held by name: while a group is gathered, the modules show whole tensors in their place.
        self._parameters: dict[str, Any] = dict(self.model.named_parameters())
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(trainable[name])
        self._fill_weights(setup.source)
        self._trained = [name for group in setup.groups for name in group.names]
        self._optimizers = Optimizers(stage, setup.groups, self._parameters, part_of)

    def loss(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self._module(batch)

    def accumulate(self, batch: Any, scale: float, last: bool) -> torch.Tensor:
        factor = scale * self._world_size * (self.loss_scale.value if self.loss_scale else 1.0)
        self._module.set_requires_gradient_sync(last or self._reduce_every_pack)
        self._module.set_requires_all_reduce(last)
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

    def frozen(self, skeleton: Any, source: TensorSource, loss: Loss) -> FrozenLoss:
        return sharded_loss(skeleton, source, loss, self._stage, self._context)

    def gradient_square(self) -> float:
        raise NotImplementedError("shards are reduced before they can be measured; the recipe's rules ask for ddp")

    def step(self, rates: Sequence[Rate]) -> None:
        self._optimizers.step(rates)

    def discard(self) -> None:
        self._optimizers.zero()

    def _held(self, kind: Kind) -> Iterator[tuple[str, Any]]:
        if kind != "weights":
            return self._optimizers.tensors(kind)
        return ((name, parameter.detach()) for name, parameter in self._parameters.items())

    def shards(self, kind: Kind) -> Iterator[Shard]:
        sharded, plain = [], []
        for name, tensor in self._held(kind):
            start, values = part_of(tensor)
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
            whole = whole_of(tensor, self._device)
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
        fill_parts(self._parameters, source, part_of)

    def hold_below(self, name: str, highest: float) -> None:
        with torch.no_grad():
            local_of(self._parameters[name]).clamp_(max=highest)

    def load_optimizer(self, source: Callable[[Kind], TensorSource], steps: dict[str, int]) -> None:
        self._optimizers.load(source, steps)

    def load_average(self, source: TensorSource) -> None:
        self._optimizers.load_average(source)
