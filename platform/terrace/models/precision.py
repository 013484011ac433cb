"""Compute precision: bf16 and fp16 through autocast over float32 weights.

Weights, gradients, their reduction and the optimizer stay in float32; matrix products run in the stage's precision.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as config.json of an exported model says it


def compute_context(precision: str, device: str) -> AbstractContextManager[object]:
    """Autocast for bf16 and fp16, nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=DTYPES[precision])
