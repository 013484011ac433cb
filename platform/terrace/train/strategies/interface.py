"""What the loop asks of a strategy. One file beside this one per strategy; none of them appears anywhere else.

A strategy owns the model, its gradients and the optimizer, however they are spread over ranks. They go in and out by parameter
name, as the stretches that a rank holds (`shards`), so checkpoints know neither the strategy nor the number of ranks and no rank handles
more than its part. Every method but `shards` is collective: all ranks call it in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from terrace.models.expert_parallel import ExpertDivision
from terrace.models.weights import TensorSource
from terrace.recipe.schema import Stage
from terrace.train.loss_scale import LossScale
from terrace.train.optimizer import ParameterGroup, Rate
from terrace.train.optimizers import Kind
from terrace.train.strategies.shards import Shard
from terrace.worker.context import WorkerContext

Loss = Callable[[Any, Any], torch.Tensor]  # (transformers model, batch) -> summed loss, float32 scalar

FrozenLoss = Callable[[Any], torch.Tensor]  # batch -> loss of a model that never trains, without gradients; every rank calls it


@dataclass
class Setup:
    """What a strategy starts from. The skeleton is on the meta device, with frozen parameters already marked."""

    skeleton: Any
    source: TensorSource
    groups: list[ParameterGroup]
    stage: Stage
    context: WorkerContext
    loss: Loss
    experts: ExpertDivision | None = None  # tensors of which the skeleton has this rank's rows alone


class Strategy(Protocol):
    """See the module's docstring. Gradients are those of `sum over ranks and packs of loss * scale`."""

    model: Any  # the transformers model (its tensors may be shards)
    loss_scale: LossScale | None  # fp16 only

    def loss(self, batch: Any) -> torch.Tensor:
        """Summed loss of one pack, float32 scalar, without gradients."""

    def accumulate(self, batch: Any, scale: float, last: bool) -> torch.Tensor:
        """Forward and backward of one pack; returns its summed loss, detached. Ranks synchronise only at the `last` pack."""

    def clip(self, limit: float | None) -> float:
        """Global norm of the gradients before clipping them to `limit`; not finite if a gradient is not."""

    def step(self, rates: Sequence[Rate]) -> None:
        """One optimizer step, learning rate and weight decay of each parameter group; gradients are zero afterwards."""

    def discard(self) -> None:
        """Drop the gradients."""

    def shards(self, kind: Kind) -> Iterator[Shard]:
        """What this rank keeps in float32 of the parameters that have state of the kind, on whatever device it lies: every number of
        a tensor is in exactly one rank's shards. No rank waits for another."""

    def tensors(self, kind: Kind) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole float32 tensor) in the same order on every rank, of the parameters that have state of the kind: for engines
        that answer with the whole model, and for tests."""

    def optimizer_steps(self) -> dict[str, int]:
        """Steps the optimizer has made, per trained parameter."""

    def state_kinds(self, name: str) -> tuple[Kind, ...]:
        """The kinds of optimizer state that a trained parameter has once it was stepped."""

    def load_weights(self, source: TensorSource) -> None:
        """Replace every weight. An average of the weights begins anew."""

    def hold_below(self, name: str, highest: float) -> None:
        """Lower the numbers of a weight that lie above `highest` to it."""

    def load_optimizer(self, source: Callable[[Kind], TensorSource], steps: dict[str, int]) -> None:
        """Replace the optimizer's state of the parameters in `steps`."""

    def load_average(self, source: TensorSource) -> None:
        """Replace the average of the weights, where the stage keeps one."""

    def frozen(self, skeleton: Any, source: TensorSource, loss: Loss) -> FrozenLoss:
        """A second model (on the meta device) that never trains, held as this strategy holds weights: whole where it holds them whole, else
        a part of it on every rank. It computes as the first one does."""

    def gradient_square(self) -> float:
        """Squared norm of the gradient that this rank has accumulated by itself before its last pack, as one of `loss * scale`."""


class StepModule(nn.Module):
    """The model and its loss as one module, because wrappers (DDP, FSDP, ZeRO) act around one forward call."""

    def __init__(self, model: Any, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> torch.Tensor:
        return self._loss(self.model, batch)


def scalars_as_vectors(model: Any) -> set[str]:
    """Make parameters without axes vectors of one element, which `fully_shard` and DeepSpeed ask for; their names."""
    scalars = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 0}
    for name, parameter in scalars.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))
    return set(scalars)
