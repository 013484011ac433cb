"""Tensors of a Hugging Face directory by name, read one at a time: from a folder of this machine, or straight from s3://.

Of a file only the header and the tensors, or the parts of tensors, that are asked for are read, in parallel ranges, so a rank reads
what it needs and no disk has to hold the model. On S3 a tensor that is asked for by itself costs one round trip at least: eight hundred of
them take about a minute; parts that are asked for together share requests.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from terrace.errors import InputError
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_model_named
from terrace.recipe.schema import Storage
from terrace.storage.files import is_remote, join, list_files, read_file, read_ranges, read_ranges_into
from terrace.storage.mirror import STORED_AT
from terrace.storage.s3 import DEFAULT_STORAGE

PARALLEL_FILES = 8
BATCH_BYTES = 128 * 2**20  # of float32; read ahead of whoever takes the parts
HEADER_BYTES = 2**20  # fetched at once; a longer header takes a second request
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stretch:
    """Numbers [start, end) of a tensor, row after row. Parts of tensors are told so whoever split them and however."""

    name: str
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


class TensorFile:
    """One safetensors file, on this machine or on S3: eight bytes with the header's length, the header (JSON), the tensors.
    `shapes` by the names that are stored."""

    def __init__(self, uri: str | Path, storage: Storage = DEFAULT_STORAGE) -> None:
        self._uri, self._storage = str(uri), storage
        start = read_ranges(self._uri, [(0, HEADER_BYTES)], storage)[0]
        length = int.from_bytes(start[:8], "little")
        header = start[8 : 8 + length]
        if len(header) < length and len(start) == HEADER_BYTES and length < 2**30:
            header = read_ranges(self._uri, [(8, length)], storage)[0]
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
        """A whole tensor."""
        shape = self.shapes[name]
        return self.stretches([Stretch(name, 0, math.prod(shape))])[0].reshape(shape)

    def stretches(self, wanted: Sequence[Stretch]) -> list[torch.Tensor]:
        """Parts of tensors, each flat; of an object on S3 neighbours come in one request."""
        dtypes = [self._dtype(stretch.name) for stretch in wanted]
        ranges = [
            (self._data + self._entries[stretch.name]["data_offsets"][0] + stretch.start * dtype.itemsize, len(stretch) * dtype.itemsize)
            for stretch, dtype in zip(wanted, dtypes)
        ]
        buffers = [torch.empty(size, dtype=torch.uint8) for _, size in ranges]
        got = read_ranges_into(self._uri, ranges, [memoryview(buffer.numpy()) for buffer in buffers], self._storage)
        for stretch, (_, size), found in zip(wanted, ranges, got):
            if found != size:
                raise InputError(f"{self._uri} ends inside {stretch.name}: {found} of {size} bytes; upload it again")
        return [buffer.view(dtype) for buffer, dtype in zip(buffers, dtypes)]

    def _dtype(self, name: str) -> torch.dtype:
        stored = self._entries[name]["dtype"]
        if stored not in DTYPES:
            raise InputError(f"{self._uri}: {name} is stored as {stored}, which cannot be read; convert it to float32 or bfloat16")
        return DTYPES[stored]


Piece = tuple[TensorFile, Stretch]  # where a part of a tensor lies, under the name in that file


def read_stretches(
    wanted: Iterable[Stretch], pieces: Callable[[Stretch], list[Piece] | None], whole: Callable[[str], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Each wanted part, flat, in the order asked. `pieces` says where one lies; None: its tensor is made from others, so `whole` makes
    it and the part is cut out. At most BATCH_BYTES, or one part, are read ahead."""
    batch: list[list[Piece]] = []
    size = 0
    for stretch in wanted:
        found = pieces(stretch)
        if found is None:
            yield from _read_batch(batch)
            batch, size = [], 0
            yield whole(stretch.name).reshape(-1)[stretch.start : stretch.end]
            continue
        batch.append(found)
        size += 4 * len(stretch)
        if size >= BATCH_BYTES:
            yield from _read_batch(batch)
            batch, size = [], 0
    yield from _read_batch(batch)


def _read_batch(batch: list[list[Piece]]) -> Iterator[torch.Tensor]:
    places: dict[TensorFile, list[tuple[int, int]]] = {}
    for number, pieces in enumerate(batch):
        for place, (file, _) in enumerate(pieces):
            places.setdefault(file, []).append((number, place))
    read = lambda file: file.stretches([batch[number][place][1] for number, place in places[file]])  # noqa: E731
    parts: list[dict[int, torch.Tensor]] = [{} for _ in batch]
    if len(places) > 1:
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            found = list(pool.map(read, places))
    else:
        found = [read(file) for file in places]
    for own, tensors in zip(places.values(), found):
        for (number, place), tensor in zip(own, tensors):
            parts[number][place] = tensor
    del found
    for number in range(len(batch)):
        mine = parts[number]
        parts[number] = {}
        yield mine[0] if len(mine) == 1 else torch.cat([mine[place] for place in sorted(mine)]) if mine else torch.empty(0)


class Directory:
    """The tensors of a Hugging Face directory (a folder or an s3:// URI) by canonical name."""

    def __init__(self, path: str | Path, family: FamilyModel | None = None, storage: Storage = DEFAULT_STORAGE) -> None:
        """`family` says how names are spelt; without one it is that of the directory's own config.json, if there is one."""
        self.path, self._storage = str(path).rstrip("/"), storage
        self._tensors = self.path  # where they lie: on the storage, of a run's folder that only says so
        if not self._remote and (Path(self.path) / STORED_AT).is_file():
            self._tensors = (Path(self.path) / STORED_AT).read_text()
        names = _stored_names(self._tensors, storage) if is_remote(self._tensors) else _names(Path(self._tensors))
        files = sorted(name for name in names if name.endswith(".safetensors"))
        if not files:
            raise InputError(f"{self.path}: no *.safetensors file; a Hugging Face model directory is expected")
        if INDEX in names:
            named = set(json.loads(read_file(join(self._tensors, INDEX), storage))["weight_map"].values())
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
        return TensorFile(join(self._tensors, name), self._storage)

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

    def stretches(self, wanted: Sequence[Stretch]) -> Iterator[torch.Tensor]:
        """Parts of tensors, flat, in the order asked; of one that is put together from several only after all of it was read."""

        def pieces(stretch: Stretch) -> list[Piece] | None:
            stored = self._stored_alone(stretch.name)
            return None if stored is None else [(self._places[stretch.name][stored], Stretch(stored, stretch.start, stretch.end))]

        return read_stretches(wanted, pieces, self.read)

    def reads_parts(self, name: str) -> bool:
        """Whether a part of the tensor can be read by itself."""
        return self._stored_alone(name) is not None

    def _stored_alone(self, name: str) -> str | None:
        """The stored tensor that is this one as it stands; None where it has to be put together, cut or turned."""
        places = self._places[name]
        if len(places) > 1:
            return None
        [(stored, file)] = places.items()
        plain = torch.empty(file.shapes[stored], device="meta")
        return stored if self._joined(name, {stored: plain}) is plain else None

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
