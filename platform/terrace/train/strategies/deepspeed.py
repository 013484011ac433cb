"""ZeRO-1, 2 and 3 through DeepSpeed, which is imported here alone.

Optimizer state is split over ranks (1), gradients too (2), parameters too (3), with offload of optimizer and
parameters to host memory or NVMe. The optimizer is torch's AdamW or SGD with the same groups as everywhere; clipping is
DeepSpeed's, at the recipe's limit. bf16: compute weights in bf16, float32 masters, float32 reduction. Trained and
frozen parameters may be mixed at will.

ZeRO-3 builds the model block by block, each rank keeping its part of it at once; ZeRO-1 and 2 hold all weights on every
rank anyway. What a rank keeps goes in and out as stretches by parameter name (`deepspeed_parts`), so checkpoints have the same format
as under any other strategy. Note that ZeRO-2 and 3 reduce gradients at every pack: that is what they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from terrace.errors import InputError
from terrace.models.build import materialise, restore_buffers
from terrace.models.parts import transformer_blocks
from terrace.models.precision import DTYPES
from terrace.models.weights import TensorSource, stretches_of
from terrace.recipe.schema import Stage
from terrace.train.loss_scale import LossScale
from terrace.train.optimizer import Rate
from terrace.train.optimizers import Kind, kinds_of, set_rates, torch_groups, torch_optimizer
from terrace.train.strategies.build_locks import build_root, remove_abandoned_locks
from terrace.train.strategies.deepspeed_optimizers import drop_gradients, flat_partitions, gradient_norm
from terrace.train.strategies.deepspeed_parts import (
    full_shape,
    own_partition,
    own_state,
    own_stretch,
    partition_of,
    set_own_state,
    set_partition,
)
from terrace.train.strategies.frozen import sharded_loss, whole_loss
from terrace.train.strategies.interface import FrozenLoss, Loss, Setup, StepModule, scalars_as_vectors
from terrace.train.strategies.shards import ReadTogether, Shard, divided, even_share, gather_even, whole_shard
from terrace.worker.context import WorkerContext, data_place

BUCKET = 500_000_000  # gradients that are reduced at once, DeepSpeed's default


class Zero:
    """See strategies.interface.Strategy."""

    def __init__(self, setup: Setup) -> None:
        stage, context = setup.stage, setup.context
        deepspeed = _import_deepspeed(context)
        self._world_size, self._stage, self._context = context.world_size, stage, context
        source = ReadTogether(setup.source, [name for name, _ in setup.skeleton.named_parameters()], context)
        self._offload_activations = stage.activation_offload
        self._zero_stage = int(stage.parallel.strategy[-1])
        self.loss_scale = LossScale() if stage.precision == "fp16" else None
        trained = sum(parameter.numel() for parameter in setup.skeleton.parameters() if parameter.requires_grad)
        configuration = _configuration(stage, context, trained)
        self._swaps = stage.parallel.offload_parameters == "nvme"
        self._scalars = scalars_as_vectors(setup.skeleton)
        # Its swapper wants to see all parameters at once, so for nvme the whole model is built first.
        by_block = self._zero_stage == 3 and stage.parallel.offload_parameters != "nvme"
        if by_block:
            self.model = _partitioned(setup, source, configuration)
        else:
            self.model = materialise(setup.skeleton, source, context.device)
        if stage.parallel.offload_parameters == "nvme":  # left to itself, DeepSpeed rounds to bf16 on a CPU, whatever it is told
            deepspeed.zero.Init(module=self.model, config_dict_or_path=configuration, mem_efficient_linear=False)
        self._parameters: dict[str, Any] = dict(self.model.named_parameters())
        self._trained = [name for group in setup.groups for name in group.names]
        # The partitions are flat, so only rules that treat every number alike come here: the recipe's rules see to it.
        self._kinds = kinds_of(setup.groups[0].rule, stage, dimensions=1)
        optimizer = torch_optimizer(setup.groups[0].rule, stage, torch_groups(setup.groups, self._parameters))
        self._shapes = {name: () if name in self._scalars else full_shape(parameter) for name, parameter in self._parameters.items()}
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=StepModule(self.model, setup.loss),
            optimizer=optimizer,
            model_parameters=[self._parameters[name] for name in self._trained],
            config=configuration,
            dist_init_required=False,
        )
        self._groups = [group.names for group in setup.groups]
        self._steps = dict.fromkeys(self._trained, 0)
        self._frozen: dict[str, Shard] = {}
        if stage.precision != "fp32" or stage.parallel.offload_parameters == "nvme":
            self._frozen = {name: self._frozen_share(name) for name in self._parameters if name not in self._steps}
        self._create_state()
        _rotary_in_float32(self.model)
        if stage.precision != "fp32" or self._frozen:
            self.load_weights(setup.source)  # the masters, which DeepSpeed made from weights in compute precision

    def loss(self, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            return self._engine(batch)

    def accumulate(self, batch: Any, scale: float, last: bool) -> torch.Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        if self.loss_scale:
            self._optimizer.override_loss_scale(self.loss_scale.value)
        if self._offload_activations:
            with torch.autograd.graph.save_on_cpu(pin_memory=True):
                loss = self._engine(batch)
        else:
            loss = self._engine(batch)
        self._engine.backward(loss * (scale * self._world_size), scale_wrt_gas=False)
        return loss.detach()

    def clip(self, limit: float | None) -> float:
        """The norm that DeepSpeed will clip by in `step` (`limit` is in its configuration)."""
        return gradient_norm(self._optimizer)

    def step(self, rates: Sequence[Rate]) -> None:
        set_rates(self._optimizer.param_groups, rates)
        self._engine.step()
        for name in self._steps:
            self._steps[name] += 1

    def discard(self) -> None:
        drop_gradients(self._optimizer)

    def shards(self, kind: Kind) -> Iterator[Shard]:
        if kind != "weights":
            for name in self._trained if kind in self._kinds else ():
                if self._steps[name]:
                    yield from self._own_state(name, kind)
            return
        alike = []
        for name, parameter in self._parameters.items():
            if name in self._steps:
                yield from self._own_state(name, None)
            elif name in self._frozen:
                yield from [self._frozen[name]] if self._frozen[name].values.numel() else []
            elif self._zero_stage == 3:
                yield from (Shard(name, self._shapes[name], *found) for found in own_partition(parameter, self._context.rank))
            else:
                alike.append(whole_shard(name, parameter.view(self._shapes[name])))
        yield from divided(alike, self._context.rank, self._world_size)

    def _own_state(self, name: str, kind: Kind | None) -> Iterator[Shard]:
        """This rank's part of a trained weight (kind None) or of its optimizer's state, if it has one."""
        for start, values in own_state(self._parameters[name], kind, self._context.rank):
            yield Shard(name, self._shapes[name], start, values)

    def _frozen_share(self, name: str) -> Shard:
        """DeepSpeed casts frozen weights to the compute precision and keeps no master: each rank has its share of one on the host."""
        first, last = even_share(math.prod(self._shapes[name]), self._context.rank, self._world_size)
        return Shard(name, self._shapes[name], first, torch.empty(last - first))

    def tensors(self, kind: Kind) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind != "weights":
            for name in self._trained if kind in self._kinds else ():
                if self._steps[name]:
                    yield name, safe_get_full_optimizer_state(self._parameters[name], kind).view(self._shapes[name])
            return
        for name, parameter in self._parameters.items():
            if name in self._steps:
                yield name, safe_get_full_fp32_param(parameter).view(self._shapes[name])
            elif name in self._frozen:
                yield name, *gather_even([self._frozen[name].values], [self._shapes[name]], self._context)
            else:
                yield name, _gathered(parameter).view(self._shapes[name])

    def optimizer_steps(self) -> dict[str, int]:
        return {name: count for name, count in self._steps.items() if count}

    def state_kinds(self, name: str) -> tuple[Kind, ...]:
        return self._kinds

    def load_average(self, source: TensorSource) -> None:
        """There is none: the recipe's rules ask for ddp or fsdp."""

    def frozen(self, skeleton: Any, source: TensorSource, loss: Loss) -> FrozenLoss:
        return (sharded_loss if self._zero_stage == 3 else whole_loss)(skeleton, source, loss, self._stage, self._context)

    def gradient_square(self) -> float:
        raise NotImplementedError("partitions are reduced before they can be measured; the recipe's rules ask for ddp")

    def load_weights(self, source: TensorSource) -> None:
        """ZeRO-3 reads what this rank keeps; under ZeRO-1 and 2 every rank holds all weights in compute precision."""
        frozen = [name for name in self._frozen if self._frozen[name].values.numel()]
        for name, found in zip(frozen, stretches_of(source, [self._frozen[name].stretch for name in frozen]), strict=True):
            self._frozen[name].values.copy_(found)
        if self._zero_stage == 3 and not self._swaps:
            self._load_partitions(source)
            return
        together = ReadTogether(source, self._parameters, self._context)
        for name in self._parameters:
            self._set(name, together(name).float())

    def _load_partitions(self, source: TensorSource) -> None:
        wanted = {name: partition_of(parameter, name, self._context.rank) for name, parameter in self._parameters.items()}
        for name, found in zip(wanted, stretches_of(source, list(wanted.values())), strict=True):
            set_partition(self._parameters[name], found)
            if name in self._steps:
                set_own_state(self._parameters[name], None, found)

    def _set(self, name: str, whole: torch.Tensor) -> None:
        """A weight in compute precision, and its master where it trains."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        parameter = self._parameters[name]
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._zero_stage == 3):
            parameter.data.copy_(whole)
        if name in self._steps:
            safe_set_full_fp32_param(parameter, whole.to(parameter.device).view(getattr(parameter, "ds_shape", parameter.shape)))

    def hold_below(self, name: str, highest: float) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self._parameters[name]
        whole = safe_get_full_fp32_param(parameter) if name in self._steps else None
        if whole is not None and bool((whole > highest).any()):
            self._set(name, whole.view(self._shapes[name]).clamp(max=highest))

    def load_optimizer(self, source: Callable[[Kind], TensorSource], steps: dict[str, int]) -> None:
        counts = [{steps.get(name, 0) for name in names} for names in self._groups]
        for names, found in zip(self._groups, counts):
            if len(found) > 1:
                raise InputError(
                    f"ZeRO keeps one step count for the {len(names)} parameters around {names[0]}, of which only some have "
                    "optimizer state to keep: set optimizer_state: reset, or parallel.strategy ddp or fsdp"
                )
        owners = getattr(self._optimizer, "sub_group_to_group_id", None)
        for number, state in enumerate(self._flat_states()):
            for value in state.values():
                value.zero_()
            if "step" in state:
                state["step"] += float(max(counts[owners[number] if owners else number]))
        for kind in self._kinds:
            wanted = {name: own_stretch(self._parameters[name], name, self._context.rank) for name in steps}
            wanted = {name: stretch for name, stretch in wanted.items() if stretch is not None}
            for name, found in zip(wanted, stretches_of(source(kind), list(wanted.values())), strict=True):
                set_own_state(self._parameters[name], kind, found)
        self._steps.update(steps)

    def _flat_states(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer's state of this rank's flat partitions, one per group (and per sub-group under ZeRO-3)."""
        return [self._optimizer.optimizer.state[flat] for flat in flat_partitions(self._optimizer)]

    def _create_state(self) -> None:
        """Create the optimizer's state before the first step.

        ZeRO-1 and 2 link parameters to their state after the first group's first step, when the other groups have
        none yet.
        """
        swapped = getattr(self._optimizer, "_swappable_optimizer_subgroup", lambda number: False)
        for number, flat in enumerate(flat_partitions(self._optimizer)):
            state = self._optimizer.optimizer.state[flat]
            if "exp_avg" in self._kinds:
                state["step"] = torch.zeros((), device=flat.device)
            if swapped(number):  # on NVMe: the partition is empty but for the time that it is swapped in
                self._optimizer._optimizer_states_and_gradient_swap_in(number)
            for kind in self._kinds:
                state[kind] = torch.zeros_like(flat.data)
            if swapped(number):
                self._optimizer._optimizer_states_and_gradient_swap_out(number)
        if self._zero_stage != 3 and self._kinds:
            self._optimizer._lazy_init_hp_params_optimizer_state()


def _import_deepspeed(context: WorkerContext) -> Any:
    """DeepSpeed chooses its device from an environment variable when it is imported."""
    if not context.device.startswith("cuda"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(context.local_rank))
    try:
        import deepspeed
    except ImportError as error:
        raise InputError("parallel.strategy zero1, zero2 and zero3 need DeepSpeed: pip install deepspeed") from error
    if not dist.is_initialized():  # one process on its own
        backend = "nccl" if context.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    if context.local_rank == 0:  # the others of the machine may already be waiting for the lock
        remove_abandoned_locks(build_root())
    deepspeed.init_distributed(dist_init_required=False)
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed


def _configuration(stage: Stage, context: WorkerContext, trained: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of a stage that trains `trained` numbers."""
    parallel = stage.parallel
    zero: dict[str, Any] = {
        "stage": int(parallel.strategy[-1]), "contiguous_gradients": True, "overlap_comm": False,
        "reduce_bucket_size": min(BUCKET, trained),  # ZeRO-3 allocates all of it: 2 GB for the smallest model
    }  # fmt: skip
    for what, choice in (("optimizer", parallel.offload_optimizer), ("param", parallel.offload_parameters)):
        if choice != "none":
            zero[f"offload_{what}"] = {"device": choice, "pin_memory": context.device.startswith("cuda")}
            if choice == "nvme":
                zero[f"offload_{what}"]["nvme_path"] = parallel.nvme_path
    if context.device.startswith("cuda"):
        zero["overlap_comm"] = True
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
    packs_per_rank = stage.batch.packs // data_place(context, stage.parallel.sequence_parallel)[1]
    configuration: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": packs_per_rank,
        "train_batch_size": packs_per_rank * context.world_size,
        "gradient_clipping": stage.optimizer.clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if stage.precision == "bf16":
        configuration["bf16"] = {"enabled": True}
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
    elif stage.precision == "fp16":
        configuration["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return configuration


def _partitioned(setup: Setup, source: TensorSource, configuration: dict[str, Any]) -> Any:
    """ZeRO-3: fill the skeleton block by block and let each rank keep its part at once.

    A rank never holds more than one whole block (or the embeddings) beside its share, in compute precision.
    """
    import deepspeed

    model, dtype = setup.skeleton, DTYPES[setup.stage.precision]
    names = {id(module): name for name, module in model.named_modules()}
    blocks = transformer_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    # Children before their parents: what holds a parameter of its own beside its children is partitioned with them.
    rest = [module for module in reversed(list(model.modules())) if id(module) not in inside and _own_tensors(module)]
    waiting: list[Any] = []  # output layers for the embeddings that they are tied to, and what holds them
    for whole in (*blocks, *rest):
        for module in whole.modules() if whole in blocks else (whole,):
            _fill_module(module, names[id(module)], source, setup.context.device, dtype)
        model.tie_weights()  # filling the embeddings made a new parameter of them
        if whole in blocks or next(whole.parameters(recurse=False), None) is not None:
            waiting.append(whole)
        for module in [module for module in waiting if not any(parameter.is_meta for parameter in module.parameters())]:
            deepspeed.zero.Init(module=module, config_dict_or_path=configuration, mem_efficient_linear=False)
            waiting.remove(module)
    restore_buffers(model)
    return model


def _own_tensors(module: torch.nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _fill_module(module: torch.nn.Module, name: str, source: TensorSource, device: str, dtype: torch.dtype) -> None:
    """Memory and weights for the module's own parameters, memory for its buffers; none for what has them already."""
    if not any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return
    module.to_empty(device=device, recurse=False)
    with torch.no_grad():
        for leaf, parameter in module.named_parameters(recurse=False):
            parameter.data = source(f"{name}.{leaf}".removeprefix(".")).to(device, dtype).reshape(parameter.shape)


def _rotary_in_float32(model: Any) -> None:
    """DeepSpeed casts buffers along with the weights; rotary frequencies must not lose digits."""
    restore_buffers(model)


def _gathered(parameter: Any) -> torch.Tensor:
    """A frozen parameter, whole (ZeRO-3 partitions frozen ones too)."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.data.detach().float().clone()
