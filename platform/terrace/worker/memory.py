"""Freed memory stays with a training process on a CPU, instead of going to the system and coming back with every step."""

from __future__ import annotations

import ctypes

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt(3)
OWN_BLOCKS_BYTES = 2**25  # the largest block that is not a mapping of its own; glibc takes no larger number
KEPT_BYTES = 2**28  # free memory at the end of the heap beyond which it shrinks


def keep_freed_memory() -> bool:
    """Whether glibc does so from now on; False where there is no glibc.

    Activations of a small model are blocks that come and go with every operation. glibc hands them back at once, so that each page
    of them is cleared and mapped anew when it is next used: 12,000 times a second in the demo's workers (docs/performance.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, OWN_BLOCKS_BYTES)) and bool(mallopt(TRIM_THRESHOLD, KEPT_BYTES))
