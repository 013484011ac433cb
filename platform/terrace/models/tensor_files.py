"""Tensors of a Hugging Face directory by name, read one at a time: from a folder of this machine, or straight from s3://.

Of an object on S3 only the header and the tensors that are asked for cross the network, in parallel ranges, so a rank reads what it
needs and no disk has to hold the model. A tensor costs one round trip at least: eight hundred of them take about a minute.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from terrace.errors import InputError
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_model_named
from terrace.recipe.schema import Storage
from terrace.storage.files import is_remote, join, list_files, read_file, read_ranges
from terrace.storage.s3 import DEFAULT_STORAGE

PARALLEL_FILES = 8
HEADER_BYTES = 2**20  # fetched at once; a longer header takes a second request
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorFile(Protocol):
    """One safetensors file. `shapes` by the names that are stored."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> torch.Tensor: ...


class LocalFile:
    """A safetensors file on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as opened:
            self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (not a mapping)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as opened:
            return opened.get_tensor(name)


class StoredFile:
    """A safetensors object on S3: eight bytes with the header's length, the header (JSON), the tensors."""

    def __init__(self, uri: str, storage: Storage) -> None:
        self._uri, self._storage = uri, storage
        start = read_ranges(uri, [(0, HEADER_BYTES)], storage)[0]
        length = int.from_bytes(start[:8], "little")
        header = start[8 : 8 + length]
        if len(header) < length and len(start) == HEADER_BYTES and length < 2**30:
            header = read_ranges(uri, [(8, length)], storage)[0]
        try:
            if len(header) != length:
                raise ValueError(f"its header should have {length} bytes")
            entries = json.loads(header)
        except ValueError as error:
            raise InputError(f"{uri} is no safetensors file: {error}") from error
        entries.pop("__metadata__", None)
        self._entries: dict[str, dict[str, Any]] = entries
        self._data = 8 + length
        self.shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}

    def read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        first, end = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{self._uri}: {name} is stored as {entry['dtype']}, which cannot be read; convert it to float32 or bfloat16")
        dtype = _DTYPES[entry["dtype"]]
        if math.prod(entry["shape"]) == 0:
            return torch.empty(entry["shape"], dtype=dtype)
        block = read_ranges(self._uri, [(self._data + first, end - first)], self._storage)[0]
        if len(block) != end - first:
            raise InputError(f"{self._uri} ends inside {name}: {len(block)} of {end - first} bytes; upload it again")
        return torch.frombuffer(bytearray(block), dtype=dtype).reshape(entry["shape"])


class Directory:
    """The tensors of a Hugging Face directory (a folder or an s3:// URI) by canonical name."""

    def __init__(self, path: str | Path, family: FamilyModel | None = None, storage: Storage = DEFAULT_STORAGE) -> None:
        """`family` says how names are spelt; without one it is that of the directory's own config.json, if there is one."""
        self.path, self._storage = str(path).rstrip("/"), storage
        names = _stored_names(self.path, storage) if self._remote else _names(Path(self.path))
        files = sorted(name for name in names if name.endswith(".safetensors"))
        if not files:
            raise InputError(f"{self.path}: no *.safetensors file; a Hugging Face model directory is expected")
        if INDEX in names:
            named = set(json.loads(self._content(INDEX))["weight_map"].values())
            absent = sorted(named - set(files))
            if absent:
                raise InputError(f"{self.path}: the index names {', '.join(absent)}, which is not there")
            files = sorted(named)
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            opened = list(pool.map(self._open, files))
        if family is None and "model_type" in self.config:
            family = family_model_named(self.config["model_type"])
        self._hold(opened, family)

    def _hold(self, files: Iterable[TensorFile], family: FamilyModel | None) -> None:
        self._family = family
        self._places: dict[str, dict[str, TensorFile]] = {}  # what is stored of a tensor: most often one, under one name
        for file in files:
            for stored in file.shapes:
                for name in family.canonical_names(stored) if family else (stored,):
                    self._places.setdefault(name, {})[stored] = file

    @property
    def _remote(self) -> bool:
        return is_remote(self.path)

    def _open(self, name: str) -> TensorFile:
        return StoredFile(join(self.path, name), self._storage) if self._remote else LocalFile(Path(self.path) / name)

    def _content(self, name: str) -> bytes:
        return read_file(join(self.path, name), self._storage)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, empty where the directory has none."""
        try:
            return json.loads(self._content("config.json"))
        except FileNotFoundError:
            return {}

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def begins_new(self, name: str) -> bool:
        """Whether a tensor that is not here is none that could be: it starts as the model's class starts it."""
        return False

    def notes(self) -> list[str]:
        """What becomes of tensors that are here and go into others, each in one line."""
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        pieces = {stored: torch.empty(file.shapes[stored], device="meta") for stored, file in self._places[name].items()}
        return tuple(self._joined(name, pieces).shape)

    def read(self, name: str) -> torch.Tensor:
        return self._joined(name, {stored: file.read(stored) for stored, file in self._places[name].items()})

    def _joined(self, name: str, pieces: dict[str, torch.Tensor]) -> torch.Tensor:
        if self._family is None:
            [tensor] = pieces.values()
            return tensor
        return self._family.joined(name, pieces, self.config)


def _stored_names(folder: str, storage: Storage) -> set[str]:
    """Files of a stored folder, without those in folders of it (the adapters of a stage have tensors of their own)."""
    found = {file.uri.removeprefix(f"{folder}/") for file in list_files(folder, storage)}
    return {name for name in found if "/" not in name}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if path.is_file()}


def local_config(directory: str, storage: Storage = DEFAULT_STORAGE) -> str:
    """A folder of this machine whose config.json is that of `directory`, for libraries that read no s3://."""
    if not is_remote(directory):
        if not os.path.isfile(os.path.join(directory, "config.json")):
            what = "no config.json in it" if os.path.isdir(directory) else "there is no such folder"
            raise InputError(f"model.pretrained: {directory}: {what}; name a Hugging Face model directory (of the hub: fetched first)")
        return directory
    try:
        content = read_file(join(directory, "config.json"), storage)
    except FileNotFoundError as error:
        raise InputError(f"{directory}: no config.json; a Hugging Face model directory is expected") from error
    folder = Path(tempfile.mkdtemp(prefix="terrace-config-"))
    (folder / "config.json").write_bytes(content)
    return str(folder)
