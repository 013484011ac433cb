"""How a decode worker asks the system for memory.

By default glibc takes every large array fresh from the kernel and gives it back at once, so each picture pays for mapping and zeroing
its pages again. Kept and used again, the same work takes a tenth less CPU. Only decode workers do this: a training process may have
reasons of its own.
"""

from __future__ import annotations

import ctypes
from functools import cache

MAPPED_FROM_BYTES = 64 * 2**20  # larger arrays than any picture or pack still go back at once
KEPT_BYTES = 128 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_memory() -> bool:
    """Keep up to `KEPT_BYTES` that this process frees. False where the C library is not glibc; once is enough."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
