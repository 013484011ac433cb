"""What the routers of a mixture of experts decide, heard while a pack runs.

The routers' outputs are kept as they are and looked at only after the forward pass: anything computed among the layers
would be missing when activation checkpointing runs them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from terrace.models.batch import DeviceBatch
from terrace.models.families.interface import Choice
from terrace.models.families.registry import family_of_model


@contextlib.contextmanager
def heard(model: Any) -> Iterator[list[Choice]]:
    """Fills the list, when the block ends, with the choices of all routers, in the order of layers."""
    family, outputs, choices = family_of_model(model), {}, []

    def keep(module: Any, _inputs: Any, output: Any) -> None:
        outputs[module] = output

    routers = family.routers(model)
    hooks = [router.register_forward_hook(keep) for router in routers]
    try:
        yield choices
    finally:
        for hook in hooks:
            hook.remove()
    choices += [family.choice(router, outputs[router]) for router in routers]


def real_tokens(batch: DeviceBatch) -> int:
    """Tokens of the batch that are a sample's: they come first; an empty pack's token and padding of a shared pack are none."""
    length = batch.input_ids.shape[1]
    first = batch.sequence.group.rank * length if batch.sequence is not None else 0
    return max(0, min(length, batch.example.tokens - first))


def segment_numbers(batch: DeviceBatch) -> torch.Tensor:
    """int64 [t]: the sample of each of `real_tokens`, counted over the whole pack."""
    length, tokens = batch.input_ids.shape[1], real_tokens(batch)
    first = batch.sequence.group.rank * length if batch.sequence is not None else 0
    places = torch.arange(first, first + tokens, device=batch.device)
    return torch.bucketize(places, batch.cu_seqlens[1:].long(), right=True)
