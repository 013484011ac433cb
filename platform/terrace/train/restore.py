"""Finding and reading checkpoints: the newest complete one, what was passed over and why, and the parts of tensors that a rank wants.

Every byte is read about twice, however many ranks there are: once by the rank that compares its file with the checksum (files are dealt to
the ranks), once by the rank that will hold it. On S3 both are reads of ranges; no disk gets a copy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from terrace.errors import InputError, TerraceError
from terrace.models.tensor_files import Piece, Stretch, TensorFile, read_stretches
from terrace.storage.files import join, list_files, open_sequential
from terrace.storage.run_storage import RunStorage
from terrace.train.checkpoint import FORMAT_VERSION, KINDS, file_name
from terrace.train.checkpoint_index import Index, Placed, index_of, whole_index
from terrace.train.checkpoint_storage import INDEX, MANIFEST, STATE, StoredCheckpoints, folder_name, stored_checkpoints
from terrace.train.strategies.interface import Strategy
from terrace.worker.collectives import from_rank_zero, gather_objects
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)
READABLE = (1, FORMAT_VERSION)
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest complete checkpoint of a folder (None: there is none) and the incomplete ones above it, with reasons."""

    path: Path | None
    passed_over: tuple[tuple[Path, str], ...] = ()


def newest_complete(
    folder: Path, storage: RunStorage, verify: bool = True, context: WorkerContext | None = None
) -> FoundCheckpoint:
    """Look from the highest step down. `verify` compares every file's sha256 with the manifest, else only sizes.

    With a `context`, all of its ranks call this, each compares its share of the files, and all get the same answer. Of a run on S3 the
    small files are copied here; the path is that of the copy.
    """
    context = context or WorkerContext()
    stored = stored_checkpoints(folder, storage)
    passed: list[tuple[Path, str]] = []
    for step, fault in from_rank_zero(_candidates(folder, stored) if context.rank == 0 else None, context):
        path = folder / folder_name(step)
        if fault is None:
            fault = _first(gather_objects(_fault_here(path, step, stored, verify, context), context))
        if fault is None:
            return FoundCheckpoint(path, tuple(passed))
        if context.rank == 0:
            log.warning("checkpoint %s is passed over: %s", path if stored is None else f"{stored.uri}/{path.name}", fault)
        passed.append((path, fault))
    return FoundCheckpoint(None, tuple(passed))


def _candidates(folder: Path, stored: StoredCheckpoints | None) -> list[tuple[int, str | None]]:
    """Steps of which there is something, highest first, with what is already known to be wrong."""
    if stored is not None:
        return stored.steps_and_faults()
    steps = [int(path.name[5:]) for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return [(step, None) for step in sorted(steps, reverse=True)]


def _fault_here(path: Path, step: int, stored: StoredCheckpoints | None, verify: bool, context: WorkerContext) -> str | None:
    fault = stored.fetch(step, path) if stored is not None else None
    place = stored.place(step) if stored is not None and fault is None else None
    return fault or find_fault(path, verify, place, (context.rank, context.world_size))


def _first(faults: Sequence[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def find_fault(path: Path, verify: bool = True, place: str | None = None, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why a checkpoint folder cannot be used, or None. `place` is where its files lie if that is not the folder; `share`, (number,
    how many), says whose share of the files is compared with their checksums."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing (the write was interrupted)"
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = dict(manifest["files"])
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if version not in READABLE:
        return f"format version {version}, this Terrace reads {' and '.join(map(str, READABLE))}"
    place = place or str(path)
    sizes = {file.uri.rpartition("/")[2]: file.size for file in list_files(place)}
    for name, expected in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != expected["bytes"]:
            return f"{name} has {sizes[name]} bytes, the manifest says {expected['bytes']}"
    if verify:
        own = [name for number, name in enumerate(sorted(files)) if number % share[1] == share[0]]
        with ThreadPoolExecutor(max_workers=8) as pool:
            for name, digest in zip(own, pool.map(lambda name: _digest(join(place, name)), own)):
                if digest != files[name]["sha256"]:
                    return f"{name} does not match its checksum"
    return None


def _digest(uri: str) -> str:
    digest = hashlib.sha256()
    with open_sequential(uri) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class CheckpointReader:
    """The tensors and the state of one complete checkpoint."""

    def __init__(self, path: Path, storage: RunStorage) -> None:
        self.path = path
        stored, step = stored_checkpoints(path.parent, storage), int(path.name[5:])
        if stored is not None and (fault := stored.fetch(step, path)):
            raise TerraceError(f"checkpoint {stored.uri}/{path.name} cannot be read: {fault}")
        self._place = str(path) if stored is None else stored.place(step)
        self.state: dict[str, Any] = json.loads((path / STATE).read_text())
        self.file = functools.cache(lambda kind, rank: TensorFile(join(self._place, file_name(kind, rank))))
        self._index = self._open_index()

    def _open_index(self) -> Index:
        if (self.path / INDEX).is_file():
            return index_of(json.loads((self.path / INDEX).read_text()))
        manifest = json.loads((self.path / MANIFEST).read_text())
        names = [name.removesuffix(".safetensors").rpartition("-") for name in sorted(manifest["files"]) if name.endswith(".safetensors")]
        return whole_index((kind, int(rank), self.file(kind, int(rank)).shapes) for kind, _, rank in names)

    def names(self, kind: str) -> Set[str]:
        return self._index.get(kind, {}).keys()

    def read(self, kind: str, name: str) -> torch.Tensor:
        """One whole tensor on the CPU. Raises TerraceError if the checkpoint lacks it."""
        return self.source(kind)(name)

    def source(self, kind: str) -> CheckpointSource:
        """The tensors of a kind, whole or in parts."""
        return CheckpointSource(self, kind)

    def pieces(self, kind: str, stretch: Stretch) -> list[Piece]:
        """The files in which a part of a tensor lies."""
        return [(self.file(kind, rank), own) for rank, own in self.placed(kind, stretch.name).overlapping(stretch)]

    def placed(self, kind: str, name: str) -> Placed:
        """Where a tensor lies. Raises TerraceError if the checkpoint lacks it."""
        placed = self._index.get(kind, {}).get(name)
        if placed is None:
            raise TerraceError(f"checkpoint {self.path} has no {kind} of {name}: it was saved by another model")
        return placed


class CheckpointSource:
    """See models.weights.PartSource."""

    def __init__(self, reader: CheckpointReader, kind: str) -> None:
        self._reader, self._kind = reader, kind

    def __call__(self, name: str) -> torch.Tensor:
        placed = self._reader.placed(self._kind, name)
        return next(self.stretches([Stretch(name, 0, placed.numbers)])).reshape(placed.shape)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._reader.placed(self._kind, name).shape if name in self._reader.names(self._kind) else None

    def stretches(self, wanted: Sequence[Stretch]) -> Iterator[torch.Tensor]:
        return read_stretches(wanted, functools.partial(self._reader.pieces, self._kind), self)


def resume(strategy: Strategy, reader: CheckpointReader) -> None:
    """Put a checkpoint of the same stage into the strategy: weights, optimizer, loss scale."""
    strategy.load_weights(reader.source("weights"))
    strategy.load_optimizer(reader.source, {name: int(n) for name, n in reader.state["optimizer_steps"].items()})
    if reader.names("average"):
        strategy.load_average(reader.source("average"))
    if strategy.loss_scale is not None and reader.state.get("loss_scale"):
        strategy.loss_scale.restore(reader.state["loss_scale"])


def keep_optimizer_state(strategy: Strategy, reader: CheckpointReader, names: list[str]) -> list[str]:
    """Carry the optimizer's state of `names` over from an earlier stage. Returns the names that had none there."""
    held = {kind: reader.names(kind) for kind in KINDS}
    wanted = {name for name in names if all(name in held[kind] for kind in strategy.state_kinds(name))}
    steps = {name: int(n) for name, n in reader.state["optimizer_steps"].items() if name in wanted}
    strategy.load_optimizer(reader.source, steps)
    return [name for name in names if name not in steps]


def previous_checkpoint(start_weights: Path, storage: RunStorage, context: WorkerContext) -> CheckpointReader:
    """The last checkpoint of the stage whose `final/` directory is given; all ranks call it. Raises InputError if it is gone."""
    found = newest_complete(start_weights.parent / "checkpoints", storage, context=context)
    if found.path is None:
        raise InputError(
            "optimizer_state: keep needs the last checkpoint of the previous stage, but "
            f"{start_weights.parent}/checkpoints has no complete one; set optimizer_state: reset"
        )
    return CheckpointReader(found.path, storage)
