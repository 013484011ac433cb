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


def kept_paths(
    seed: int, sources: Sequence[str], samples: Sequence[str], epochs: Sequence[int], views: int, layers: int, rate: float
) -> np.ndarray:
    """float32 [views, B, layers, 2]: factors of the two branches of every block, 0 where a view of a picture goes past one. The chance of
    that rises in a line from 0 in the first block to `rate` in the last."""
    chances = rate * np.arange(layers, dtype=np.float64)[:, None] / max(1, layers - 1)
    drawn = [
        [generator_of(seed, source, sample, int(epoch), f"paths {view}").random((layers, 2)) for view in range(views)]
        for source, sample, epoch in zip(sources, samples, epochs, strict=True)
    ]
    kept = np.where(np.asarray(drawn).reshape(-1, views, layers, 2) >= chances, 1.0 / (1.0 - chances), 0.0)
    return kept.swapaxes(0, 1).astype(np.float32)
