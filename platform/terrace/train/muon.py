"""torch's Muon, its matrices orthogonalised together: those of one shape are one batch of products.

    b <- m b + (1 - m) g;   u = orthogonal((1 - m) g + m b);   w <- (1 - lr d) w - lr 0.2 sqrt(max(rows, columns)) u

State, groups and what is computed for a matrix are torch's, and a matrix gets the same bits whatever stands beside it. Two things
differ: small matrices cost their products instead of the calls around them, and a processor without bf16 instructions orthogonalises
in float32, where products in bf16 are emulated (20 times slower with AVX2, docs/performance.md).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

BATCH_NUMBERS = 2**22  # numbers of the matrices that are orthogonalised together at most; a larger one goes alone
ALONE = 16  # matrices with a side up to this go alone: PyTorch multiplies as small ones by other kernels when there are several


class Muon(torch.optim.Muon):
    """Nesterov momentum, and updates scaled as `match_rms_adamw` does: ValueError for other options of torch's, and for a closure."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        if not self.defaults["nesterov"] or self.defaults["adjust_lr_fn"] != "match_rms_adamw":
            raise ValueError("Muon here has nesterov=True and adjust_lr_fn='match_rms_adamw'")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("Muon.step takes no closure: compute the gradients first")
        for group in self.param_groups:
            weights: list[torch.Tensor] = []
            gradients: list[torch.Tensor] = []
            momenta: list[torch.Tensor] = []
            self._init_group(group, weights, gradients, momenta)
            for places in _batches(weights):  # beside the state there are never more updates than those of one batch
                updates = []
                for place in places:
                    momenta[place].lerp_(gradients[place], 1 - group["momentum"])
                    updates.append(gradients[place].lerp(momenta[place], group["momentum"]))
                for place, direction in zip(places, _orthogonal(updates, group), strict=True):
                    weight = weights[place]
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def _orthogonal(updates: Sequence[torch.Tensor], options: dict[str, Any]) -> Sequence[torch.Tensor]:
    """The updates of one batch, [rows, columns] each, orthogonalised."""
    dtype = products_in(updates[0].device.type)
    how = (options["ns_coefficients"], options["ns_steps"], options["eps"])
    if isinstance(updates[0], DTensor):  # a shard: torch brings together what its products need
        return [orthogonalise(update.to(dtype), *how) for update in updates]
    return orthogonalise(torch.stack([update.to(dtype) for update in updates]), *how).unbind()


def _batches(weights: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """Places of the weights that are stepped together: of one shape, within BATCH_NUMBERS."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, weight in enumerate(weights):
        alone = isinstance(weight, DTensor) or min(weight.shape) <= ALONE
        alike[place if alone else (weight.shape, weight.device)].append(place)
    for places in alike.values():
        most = max(1, BATCH_NUMBERS // max(1, weights[places[0]].numel()))
        yield from (places[start : start + most] for start in range(0, len(places), most))


def orthogonalise(matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float) -> torch.Tensor:
    """[..., rows, columns] of the same directions and singular values near 1, by iterations of Newton-Schulz.

    x <- a x + (b y + c y y) x with y = x x^T, as torch has it (https://kellerjordan.github.io/posts/muon/), for one matrix or a batch.
    """
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    add_product = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=epsilon)).contiguous()
    for _ in range(steps):
        y = x @ x.mT
        x = add_product(x, add_product(y, y, y, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@functools.cache
def products_in(device_type: str) -> torch.dtype:
    """bf16, as Muon was published, unless it would be emulated."""
    has_it = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device_type != "cpu" or has_it() else torch.float32
