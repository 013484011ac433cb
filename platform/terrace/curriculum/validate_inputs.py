"""What a recipe wants and is not there: sources, checkpoints, tokenizers, suites, trackers. Looked at without reading samples."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import PurePath

from terrace.errors import TerraceError
from terrace.recipe.errors import Path, Problem
from terrace.recipe.rules_places import named_places
from terrace.recipe.schema import Recipe, Storage
from terrace.storage.files import file_size, is_remote, join, local_path
from terrace.storage.s3 import retried, s3
from terrace.track.also import missing_clients

QUICK = {"max_attempts": 2, "timeout_seconds": 10.0}  # whoever validates waits for an answer
DRAWN = "demo-corpus"  # a folder that is drawn when it is first used
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_INSIDE = {"model": "config.json", "tokenizer": "tokenizer.json"}  # the file that such a folder holds


def missing_inputs(recipe: Recipe, remote: bool = True) -> list[Problem]:
    """A problem for each file, folder and tracker that the recipe names and that is not there. `remote=False` asks no bucket."""
    storage = recipe.data.storage.model_copy(update=QUICK)
    unreachable: set[str] = set()
    clients = missing_clients(recipe.tracking.also)
    told = [f"{kind} is not installed here; `{install}` installs its client" for kind, install in clients.items()]
    wanted = [Problem(("tracking", "also"), one) for one in told]
    read = [(path, uri) for path, uri in named_places(recipe) if path[0] != "recaption"]  # whose folder is a result
    places = [(path, uri) for path, uri in read if remote or not is_remote(uri)]
    return wanted + [problem for path, uri in places for problem in _missing(path, uri, storage, unreachable)]


def _missing(path: Path, uri: str, storage: Storage, unreachable: set[str]) -> Iterator[Problem]:
    if not uri.strip() or DRAWN in PurePath(uri).parts:
        return
    bucket = uri.removeprefix("s3://").partition("/")[0] if is_remote(uri) else ""
    if bucket in unreachable:
        return
    inside = _INSIDE.get(str(path[2] if path[0] == "stages" else path[0]))
    try:
        if inside is not None:
            if not _is_tokenizer_file(path, uri) and file_size(join(uri, inside), storage) is None:
                yield Problem(path, f"there is no {inside} in {uri}{_hint(uri)}")
        elif not _is_there(uri, storage):
            yield Problem(path, f"there is nothing at {uri}{_hint(uri)}")
    except (TerraceError, OSError, ValueError) as error:
        unreachable.add(bucket)
        yield Problem(path, f"{uri} cannot be looked at: {str(error).splitlines()[0]} (--offline leaves this out)")


def _is_tokenizer_file(path: Path, uri: str) -> bool:
    return path[0] == "tokenizer" and not is_remote(uri) and os.path.isfile(local_path(uri))


def _is_there(uri: str, storage: Storage) -> bool:
    if is_remote(uri):
        pattern = any(mark in uri for mark in "*?[")
        return retried(lambda: bool(s3(storage).glob(uri) if pattern else s3(storage).exists(uri)), uri, storage)

    path = local_path(uri)
    if os.path.isdir(path):
        return any(os.scandir(path))
    return os.path.exists(path) or any(True for _ in glob.iglob(path, recursive=True))


def _hint(uri: str) -> str:
    if is_remote(uri):
        return ""
    if _HUB_NAME.fullmatch(uri) and not os.path.exists(uri.partition("/")[0]):
        return f" (if it is a name on the hub: hf download {uri} --local-dir FOLDER)"
    return "" if os.path.isabs(os.path.expanduser(uri)) else f" (from {os.getcwd()}; nothing of that name lies beside the recipe either)"
