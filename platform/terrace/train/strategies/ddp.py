"""DDP: every rank holds the whole model; gradients are averaged while the last pack's backward runs.

Also what runs on one process (no wrapper then). Memory per rank: 16 bytes per trained parameter (float32 weight,
gradient, two moments) and 4 per frozen one; Muon's momentum is divided by the ranks (train.matrix_shares). bf16 and fp16
through autocast, so weights, gradients and their reduction stay float32. Experts may be divided over ranks (`parallel.experts`,
own_experts): DDP then leaves their tensors alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from terrace.models.build import materialise
from terrace.models.precision import compute_context
from terrace.models.weights import TensorSource
from terrace.train.loss_scale import LossScale
from terrace.train.matrix_shares import MatrixShares, shared_out
from terrace.train.optimizer import Rate
from terrace.train.optimizers import Kind, Optimizers
from terrace.train.strategies.frozen import whole_loss
from terrace.train.strategies.interface import FrozenLoss, Loss, Setup, StepModule
from terrace.train.strategies.own_experts import OwnExperts
from terrace.train.strategies.shards import ReadTogether, Shard, divided, whole_shard


class DataParallel:
    """See strategies.interface.Strategy."""

    def __init__(self, setup: Setup) -> None:
        stage, context = setup.stage, setup.context
        self._stage = stage
        self._precision, self._device, self._world_size = stage.precision, context.device, context.world_size
        self._offload = stage.activation_offload
        self.loss_scale = LossScale() if stage.precision == "fp16" else None
        self._context = context
        self._experts = OwnExperts(setup.experts, context.world_size) if setup.experts is not None else None
        names = [name for name, _ in setup.skeleton.named_parameters()]
        self.model = materialise(setup.skeleton, self._together(setup.source, names), context.device)
        self._parameters = dict(self.model.named_parameters())
        self._module: Any = StepModule(self.model, setup.loss)
        self._synchronised = context.world_size > 1
        if self._synchronised:
            own = [f"model.{name}" for name in names if self._is_own(name)]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._module, own)
            self._module = DistributedDataParallel(self._module, forward_sync_buffers=False, gradient_as_bucket_view=True)
        matrices = {name: self._parameters[name].shape for group in setup.groups if group.rule == "muon" for name in group.names}
        owners = shared_out(matrices, context.world_size) if self._synchronised else {}
        self._shares = MatrixShares(context.rank, owners)
        self._optimizers = Optimizers(stage, setup.groups, self._parameters, lambda tensor: (0, tensor.view(-1)), self._shares)
        self._trained = [name for group in setup.groups for name in group.names]

    def loss(self, batch: Any) -> torch.Tensor:
        module = self._module.module if self._synchronised else self._module
        with torch.no_grad(), compute_context(self._precision, self._device):
            return module(batch)

    def accumulate(self, batch: Any, scale: float, last: bool) -> torch.Tensor:
        factor = scale * self._world_size * (self.loss_scale.value if self.loss_scale else 1.0)
        quiet = self._synchronised and not last
        with self._module.no_sync() if quiet else contextlib.nullcontext():
            with self._kept_on_host(), compute_context(self._precision, self._device):
                loss = self._module(batch)
            (loss * factor).backward()
        if last and self._experts is not None:
            self._experts.reduce(self._parameters)
        return loss.detach()

    def _kept_on_host(self) -> contextlib.AbstractContextManager[object]:
        if self._offload:
            return torch.autograd.graph.save_on_cpu(pin_memory=str(self._device).startswith("cuda"))
        return contextlib.nullcontext()

    def clip(self, limit: float | None) -> float:
        gradients = {name: found for name in self._trained if (found := self._parameters[name].grad) is not None}
        if self.loss_scale:
            torch._foreach_mul_(list(gradients.values()), 1.0 / self.loss_scale.value)
        alike = torch.nn.utils.get_total_norm
        norm = self._experts.norm(gradients) if self._experts is not None else alike(list(gradients.values()))
        if limit is not None and bool(torch.isfinite(norm)):
            torch.nn.utils.clip_grads_with_norm_([self._parameters[name] for name in self._trained], limit, norm)
        return float(norm)

    def frozen(self, skeleton: Any, source: TensorSource, loss: Loss) -> FrozenLoss:
        return whole_loss(skeleton, source, loss, self._stage, self._context)

    def gradient_square(self) -> float:
        gradients = [p.grad for p in (self._parameters[name] for name in self._trained) if p.grad is not None]
        factor = self._world_size * (self.loss_scale.value if self.loss_scale else 1.0)
        return (float(torch.nn.utils.get_total_norm(gradients)) / factor) ** 2

    def step(self, rates: Sequence[Rate]) -> None:
        self._optimizers.step(rates)

    def discard(self) -> None:
        self._optimizers.zero()

    def _is_own(self, name: str) -> bool:
        """Whether this rank has a part of a tensor, of experts, rather than all of it."""
        return self._experts is not None and name in self._experts

    def _together(self, source: TensorSource, names: Iterable[str]) -> TensorSource:
        """What this rank holds of these tensors, each byte of them read by one rank."""
        together = ReadTogether(source, [name for name in names if not self._is_own(name)], self._context)
        experts = self._experts
        if experts is None:
            return together
        return lambda name: experts.read(source, name) if name in experts else together(name)

    def _held(self, kind: Kind) -> Iterator[tuple[str, torch.Tensor]]:
        if kind != "weights":
            return self._optimizers.tensors(kind)
        return ((name, parameter.detach()) for name, parameter in self._parameters.items())

    def shards(self, kind: Kind) -> Iterator[Shard]:
        if self._shared(kind):
            yield from (whole_shard(name, tensor) for name, tensor in self._optimizers.tensors(kind))
            return
        held = list(self._held(kind))
        alike = (whole_shard(name, tensor) for name, tensor in held if not self._is_own(name))
        yield from divided(alike, self._context.rank, self._context.world_size)
        if self._experts is not None:
            yield from self._experts.shards((name, tensor) for name, tensor in held if self._is_own(name))

    def tensors(self, kind: Kind) -> Iterator[tuple[str, torch.Tensor]]:
        held = dict(self._held(kind))
        if self._shared(kind):
            steps = self._optimizers.steps()
            held |= {name: torch.empty_like(self._parameters[name]) for name in self._shares.owners if name in steps and name not in held}
            self._shares.exchange(held)
        for name, tensor in held.items() if kind == "weights" else sorted(held.items()):
            yield name, self._experts.whole(name, tensor) if self._experts is not None and self._is_own(name) else tensor

    def _shared(self, kind: Kind) -> bool:
        """Whether every rank has other tensors of the kind, whole: the momentum of the matrices that it steps."""
        return kind == "momentum_buffer" and bool(self._shares.owners)

    def optimizer_steps(self) -> dict[str, int]:
        return self._optimizers.steps()

    def state_kinds(self, name: str) -> tuple[Kind, ...]:
        return self._optimizers.kinds(name)

    def load_weights(self, source: TensorSource) -> None:
        source = self._together(source, self._parameters)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(source(name))
        self._optimizers.restart_average()

    def hold_below(self, name: str, highest: float) -> None:
        with torch.no_grad():
            self._parameters[name].clamp_(max=highest)

    def load_optimizer(self, source: Callable[[Kind], TensorSource], steps: dict[str, int]) -> None:
        self._optimizers.load(
            lambda kind: source(kind) if self._shared(kind) else self._together(source(kind), steps), steps
        )

    def load_average(self, source: TensorSource) -> None:
        self._optimizers.load_average(self._together(source, self._trained))
