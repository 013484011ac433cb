"""The part of a parameter, and of its optimizer's state, that DeepSpeed keeps on this rank, as a stretch of its numbers.

ZeRO-1 and 2 cut all parameters of a group, laid end to end, into partitions: a parameter knows which of its numbers fall into this
rank's (`_hp_mapping`, none if none do). ZeRO-3 cuts every parameter into equal partitions, the last one filled up (`ds_tensor`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from terrace.models.tensor_files import Stretch


def full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def partition_of(parameter: Any, name: str, rank: int) -> Stretch:
    """ZeRO-3: the numbers of a parameter in this rank's partition (none: at the end of it)."""
    numbers, length = math.prod(full_shape(parameter)), parameter.ds_tensor.ds_numel
    return Stretch(name, min(rank * length, numbers), min((rank + 1) * length, numbers))


def own_stretch(parameter: Any, name: str, rank: int) -> Stretch | None:
    """The numbers of a trained parameter whose master and state are kept here."""
    if hasattr(parameter, "ds_id"):
        return partition_of(parameter, name, rank)
    if parameter._hp_mapping is None:
        return None
    address = parameter._hp_mapping.lp_fragment_address
    return Stretch(name, address.start, address.start + address.numel)


def own_state(parameter: Any, kind: str | None, rank: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first number, numbers) of a trained parameter's float32 master (kind None) or state on this rank, if it has any."""
    stretch = own_stretch(parameter, "", rank)
    if stretch is None or not len(stretch):
        return
    if hasattr(parameter, "ds_id"):
        values = parameter._z3_optimizer.get_local_fp32_param(parameter, kind)
        if parameter._z3_optimizer.swap_optimizer:  # on NVMe: what was read lies in a buffer that the next one takes
            values = values.clone()
    else:
        values = parameter._hp_mapping.get_hp_fragment(kind)
    yield stretch.start, values.detach().reshape(-1)[: len(stretch)]


def set_own_state(parameter: Any, kind: str | None, values: torch.Tensor) -> None:
    """Replace this rank's numbers of a trained parameter's master (kind None) or state; what fills up a partition is zero."""
    if not hasattr(parameter, "ds_id"):
        parameter._hp_mapping.get_hp_fragment(kind).data.copy_(values)
        return
    optimizer = parameter._z3_optimizer
    # Its own setter asks for the partition of the weight itself, which is elsewhere when weights lie on NVMe.
    own, group = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=kind)
    own.data[: len(values)].copy_(values)
    own.data[len(values) :].zero_()
    if optimizer._swappable_optimizer_subgroup(group):
        optimizer._optimizer_states_and_gradient_swap_out(group)


def own_partition(parameter: Any, rank: int) -> Iterator[tuple[int, torch.Tensor]]:
    """ZeRO-3: (first number, numbers) of a weight in compute precision on this rank, if it has any; where weights stay in memory."""
    stretch = partition_of(parameter, "", rank)
    if len(stretch):
        yield stretch.start, parameter.ds_tensor.data.reshape(-1)[: len(stretch)].float()


def set_partition(parameter: Any, values: torch.Tensor) -> None:
    """ZeRO-3: replace this rank's numbers of a weight in compute precision. One that was gathered is given up first: it is gathered
    anew when it is wanted."""
    parameter.partition()
    own = parameter.ds_tensor.data.reshape(-1)
    own[: len(values)].copy_(values)
    own[len(values) :].zero_()
