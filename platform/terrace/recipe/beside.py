"""Relative paths in a recipe file: from the file's own folder where something lies there, otherwise from the current one.

So a recipe and its rows may be moved together and started from anywhere; what stands beside the file becomes an absolute path,
which means the same in every process. The resolved recipe of a run directory is left as it is: its paths were settled when the
run was started, and the run's own folders (`data/`) lie beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path as FilePath

from terrace.recipe.document import Entry
from terrace.recipe.schema_model import FROM_STAGE

RUN_FILES = ("journal.jsonl", "stages")  # what makes a folder a run directory


def found_beside(root: Entry, folder: FilePath) -> None:
    """Replace, in the entries of one file, the relative paths of what lies in the file's folder."""
    if any((folder / name).exists() for name in RUN_FILES):
        return
    for entry in _paths(root):
        before, colon, path = _parts(entry.value)
        if path and not os.path.isabs(path) and not path.startswith("~") and "://" not in path and _is_there(folder, path):
            entry.value = before + colon + os.path.abspath(folder / path)


def _paths(root: Entry) -> Iterator[Entry]:
    """The entries that name files: of the model, the tokenizer, the sources and the suites."""
    for owner in (root, *_entries(_at(root, "stages"))):
        model = _at(owner, "model")
        yield from _texts(_at(model, "pretrained"))
        for part in _entries(_at(model, "init")):
            yield from (entry for entry in _texts(part) if entry.value != "random" and not entry.value.startswith(FROM_STAGE))
    tokenizer = _at(root, "tokenizer")
    yield from _texts(tokenizer)
    yield from _texts(_at(tokenizer, "path"))
    for source in _entries(_at(_at(root, "data"), "sources")):
        yield from _texts(_at(source, "uri"))
        yield from _texts(_at(source, "images_root"))
    for stage in _entries(_at(root, "stages")):
        for suite in _entries(_at(_at(stage, "evaluate"), "suites")):
            yield from _texts(suite)


def _parts(text: str) -> tuple[str, str, str]:
    """(what stands before a path, the colon, the path): a suite is `kind:path`."""
    kind, colon, path = text.partition(":")
    return (kind, colon, path) if colon and kind.isalpha() and not path.startswith("//") else ("", "", text)


def _is_there(folder: FilePath, path: str) -> bool:
    fixed = path
    for mark in "*?[":
        fixed = fixed.partition(mark)[0]
    return os.path.exists(folder / (fixed if fixed == path else os.path.dirname(fixed)))


def _at(entry: Entry | None, key: str) -> Entry | None:
    return entry.value.get(key) if entry is not None and isinstance(entry.value, dict) else None


def _entries(entry: Entry | None) -> Iterator[Entry]:
    if entry is not None and isinstance(entry.value, dict | list):
        yield from (entry.value.values() if isinstance(entry.value, dict) else entry.value)


def _texts(entry: Entry | None) -> Iterator[Entry]:
    if entry is not None and isinstance(entry.value, str) and "\0" not in entry.value:
        yield entry
