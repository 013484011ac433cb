"""Follows a stage's metrics.jsonl while a trainer on any machine writes it: no message per step crosses Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsFollower:
    """Yields the complete rows added since the last call. A file that was cut (a resume does that) is read anew.

    Rows then come again, so a reader that must see every step once compares the step with the last one it took.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0
        self._inode = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                status = self.path.stat()
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._offset, self._inode = 0, status.st_ino
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.split(b"\n"):
            if line:
                yield json.loads(line)


def last_row(path: Path, with_key: str | None = None) -> dict[str, Any] | None:
    """The newest complete row of a metrics file, read from its end; with `with_key` the newest of the last ones that has it."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 65536))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    if with_key is not None:
        found = (json.loads(line) for line in reversed(lines[1:] if size > 65536 else lines) if f'"{with_key}"'.encode() in line)
        return next((row for row in found if with_key in row), None)
    return json.loads(lines[-1]) if lines and lines[-1] else None
