"""Which files of models/modules a class of our own needs: its own and those that they import from beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import terrace.families.slicing as slicing
import terrace.models.modules as modules

FOLDER = Path(modules.__path__[0])
ELSEWHERE = {"slicing": Path(slicing.__file__)}  # files of other folders that need nothing of the platform


def files_of(roots: Iterable[str]) -> list[Path]:
    """Of the modules `roots`, which stand in front of a dot (`modeling_x.Class`), sorted by name."""
    waiting, found = {root.partition(".")[0] for root in roots}, set[str]()
    while waiting:
        name = waiting.pop()
        found.add(name)
        imported = re.findall(r"^from \.(\w+) import", _file(name).read_text(encoding="utf-8"), re.MULTILINE)
        waiting |= {*imported} - found
    return [_file(name) for name in sorted(found)]


def _file(name: str) -> Path:
    return ELSEWHERE.get(name, FOLDER / f"{name}.py")
