"""`metrics.jsonl`: one JSON object per optimizer step, and never two for the same step, whatever was interrupted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines; opening it cuts those beyond `last_step`, which a resumed run will write again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [line for line in _whole_lines(path) if line["step"] <= last_step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the stage runs)
        self.last: dict[str, Any] | None = kept[-1] if kept else None

    def append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.last = line

    def sync(self) -> None:
        """Before a checkpoint: the lines up to its step must survive whatever the checkpoint survives."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").split("\n"):
        try:
            value = json.loads(text) if text else None
        except ValueError:
            break
        if isinstance(value, dict):
            lines.append(value)
    return lines
