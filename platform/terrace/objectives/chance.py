"""Chance in training that no process owns: drawn from (stage seed, source, sample, epoch, what for).

It is the same on any rank, in packs of any size, and after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from terrace.data.order.permutation import generator_of


def kept_patches(
    seed: int, sources: Sequence[str], samples: Sequence[str], epochs: Sequence[int], patches: int, keep: int
) -> np.ndarray:
    """int64 [B, keep], ascending: which of its patches each picture shows, in every pass over its source others."""
    drawn = [
        np.sort(generator_of(seed, source, sample, int(epoch), "patches").permutation(patches)[:keep])
        for source, sample, epoch in zip(sources, samples, epochs, strict=True)
    ]
    return np.asarray(drawn, np.int64).reshape(-1, keep)


def patch_noise(seed: int, sources: Sequence[str], samples: Sequence[str], epochs: Sequence[int], patches: int) -> np.ndarray:
    """float32 [B, patches]: a random number of each patch, by which an encoder that masks sorts them."""
    drawn = [
        generator_of(seed, source, sample, int(epoch), "patches").random(patches, np.float32)
        for source, sample, epoch in zip(sources, samples, epochs, strict=True)
    ]
    return np.asarray(drawn, np.float32).reshape(-1, patches)
