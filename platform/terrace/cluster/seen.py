"""When this process first saw a file as it is now, by its own clock: the file's own time is another machine's, or the storage's.

A worker's clock may be minutes away from the controller's; what both agree on is that the file has changed since the last look. So a file
counts as just changed when it is looked at for the first time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

_SEEN: dict[Path, tuple[int, float]] = {}


def unchanged_since(path: Path, clock: Callable[[], float] | None = None) -> float:
    """Seconds by `clock` (the epoch's unless given). Raises FileNotFoundError where there is no such file."""
    try:
        changed = path.stat().st_mtime_ns
    except FileNotFoundError:
        _SEEN.pop(path, None)
        raise
    seen = _SEEN.get(path)
    if seen is None or seen[0] != changed:
        seen = _SEEN[path] = (changed, (clock or time.time)())
    return seen[1]
