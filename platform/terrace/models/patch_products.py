"""Patch embeddings as products of matrices: a convolution whose kernel covers its whole input is one.

Towers of the Qwen kind get their pictures as patches and embed each by a `Conv3d` of the patch's own size. Convolution kernels are not
made for that: cuDNN's in bf16 was measured 50,000 times slower than the product on some devices
(https://github.com/huggingface/transformers/issues/45750), and on a CPU it takes two and a half times as long (docs/performance.md).
Weights keep their names and shapes, so checkpoints, strategies and exports know nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class PatchProduct(torch.nn.Conv3d):
    """A `Conv3d` that multiplies where its input is one patch a row; elsewhere it convolves."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[P, C, t, h, w] -> [P, out, 1, 1, 1]"""
        if patches.ndim != 5 or patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def as_products(model: Any) -> int:
    """Let the model's patch embeddings multiply; how many of them there are."""
    found = [module for module in model.modules() if type(module) is torch.nn.Conv3d and _covers(module)]
    for module in found:
        module.__class__ = PatchProduct
    return len(found)


def _covers(module: torch.nn.Conv3d) -> bool:
    """Whether patches do not overlap, and nothing stands between or around them."""
    plain = module.padding in ((0, 0, 0), "valid") and module.dilation == (1, 1, 1) and module.groups == 1
    return plain and module.stride == module.kernel_size
