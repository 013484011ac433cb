"""Fused kernels for what is neither a matrix product nor attention: Liger's RMSNorm and SwiGLU, on CUDA where installed.

A language layer reads and writes its activations a dozen times for norms and gates in plain PyTorch; fused, about four
times, and the values between are not kept for backward. The mathematics is the same (statistics in float32). The
loss needs none of it (`models.head` never holds the logits), and rotary positions are left to transformers.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from terrace.errors import InputError


def choose_kernels(wanted: str, device_type: str) -> tuple[str, str]:
    """`liger` or `torch`, and the reason. `wanted` is the recipe's `model.kernels`. Raises InputError if it cannot run."""
    installed = importlib.util.find_spec("liger_kernel") is not None
    if wanted == "torch":
        return "torch", "named by the recipe"
    if wanted == "liger":
        if device_type != "cuda" or not installed:
            what = "a CUDA device" if device_type != "cuda" else "the package liger-kernel (pip install liger-kernel)"
            raise InputError(f"model.kernels: liger needs {what}; auto takes what runs here")
        return "liger", "named by the recipe"
    if device_type != "cuda":
        return "torch", f"device {device_type}: Liger's kernels are for CUDA"
    return ("liger", "CUDA and liger-kernel installed") if installed else ("torch", "liger-kernel is not installed")


def use_liger(model: Any) -> tuple[int, int]:
    """Run the model's RMSNorms and SwiGLUs through Liger; how many of each. Parameters and names stay what they are."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_swiglu

    norms = gates = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):  # Gemma's has another form
            module.forward = functools.partial(_rms_norm, module, liger_rms_norm)
            norms += 1
        elif {"gate_proj", "up_proj", "down_proj"} <= set(dict(module.named_children())) and _is_silu(module.act_fn):
            module.forward = functools.partial(_swiglu, module, liger_swiglu)
            gates += 1
    return norms, gates


def _is_silu(function: Any) -> bool:
    return "silu" in type(function).__name__.lower()


def _rms_norm(module: Any, kernel: Any, hidden: torch.Tensor) -> torch.Tensor:
    # Not in place: the gradient that comes in also goes on along the residual stream.
    return kernel(hidden, module.weight, module.variance_epsilon, in_place=False)


def _swiglu(module: Any, kernel: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module.down_proj(kernel(module.gate_proj(hidden), module.up_proj(hidden)))
