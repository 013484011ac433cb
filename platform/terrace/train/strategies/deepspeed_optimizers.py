"""DeepSpeed's three optimizers around ours, told apart by their attributes: ZeRO-3's, that of ZeRO-1 and 2, and another for ZeRO-1 in
bf16. What they lack in common is here.
"""

from __future__ import annotations

from typing import Any

import torch

from terrace.errors import TerraceError


def flat_partitions(optimizer: Any) -> list[torch.Tensor]:
    """This rank's float32 partitions, which are the keys of the optimizer's state."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise TerraceError(f"DeepSpeed's {type(optimizer).__name__} is not one that Terrace knows; install deepspeed 0.19")


def gradient_norm(optimizer: Any) -> float:
    """Global norm of the reduced gradients before a step; not a number if a gradient is not finite."""
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors, is_invalid_grad_norm

    if hasattr(optimizer, "_get_norm_groups"):
        norm = combine_grad_norm_groups(optimizer._get_norm_groups())
    elif hasattr(optimizer, "scaled_global_norm"):
        norm = optimizer.scaled_global_norm()
    else:
        norm = get_global_norm_of_tensors(optimizer.get_grads_for_norm()[0], mpu=None, norm_type=2)
    if is_invalid_grad_norm(norm):
        return float("nan")
    return float(norm) / float(getattr(optimizer, "loss_scale", 1.0))


def drop_gradients(optimizer: Any) -> None:
    """Forget accumulated gradients, as DeepSpeed does after an overflow."""
    if hasattr(optimizer, "_overflow_clean_up"):
        optimizer._overflow_clean_up(optimizer.loss_scale)
        optimizer.micro_step_id = 0
    elif hasattr(optimizer, "clear_hp_grads"):
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
    else:
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for key in gradients:
                gradients[key] = None
        optimizer.micro_step_id = -1
