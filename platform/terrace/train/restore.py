"""Finding and reading checkpoints: the newest complete one, what was passed over and why, and tensors by name."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from terrace.errors import InputError, TerraceError
from terrace.storage.durable import file_digest
from terrace.storage.run_storage import RunStorage
from terrace.train.checkpoint import FORMAT_VERSION, KINDS, OBJECTIVE
from terrace.train.checkpoint_storage import StoredCheckpoints, folder_name, stored_checkpoints
from terrace.train.strategies.interface import Strategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest complete checkpoint of a folder (None: there is none) and the incomplete ones above it, with reasons."""

    path: Path | None
    passed_over: tuple[tuple[Path, str], ...] = ()


def newest_complete(folder: Path, storage: RunStorage, verify: bool = True) -> FoundCheckpoint:
    """Look from the highest step down. `verify` compares every file's sha256 with the manifest, else only sizes.

    Of a run on S3 the checkpoint is copied here first; its path is that of the copy.
    """
    if (stored := stored_checkpoints(folder, storage)) is not None:
        return _newest_stored(stored, folder, verify)
    passed: list[tuple[Path, str]] = []
    candidates = sorted((p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()), reverse=True)
    candidates.sort(key=lambda path: int(path.name[5:]), reverse=True)
    for path in candidates:
        fault = find_fault(path, verify)
        if fault is None:
            return FoundCheckpoint(path, tuple(passed))
        log.warning("checkpoint %s is passed over: %s", path, fault)
        passed.append((path, fault))
    return FoundCheckpoint(None, tuple(passed))


def _newest_stored(stored: StoredCheckpoints, folder: Path, verify: bool) -> FoundCheckpoint:
    passed: list[tuple[Path, str]] = []
    for step, fault in stored.steps_and_faults():
        path = folder / folder_name(step)
        fault = fault or stored.fetch(step, path) or find_fault(path, verify)
        if fault is None:
            return FoundCheckpoint(path, tuple(passed))
        log.warning("checkpoint %s/%s is passed over: %s", stored.uri, path.name, fault)
        passed.append((path, fault))
    return FoundCheckpoint(None, tuple(passed))


def find_fault(path: Path, verify: bool = True) -> str | None:
    """Why a checkpoint folder cannot be used, or None."""
    manifest_file = path / "manifest.json"
    if not manifest_file.is_file():
        return "manifest.json is missing (the write was interrupted)"
    try:
        manifest = json.loads(manifest_file.read_text())
        files = dict(manifest["files"])
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        return f"manifest.json cannot be read: {error}"
    if version != FORMAT_VERSION:
        return f"format version {version}, this Terrace reads {FORMAT_VERSION}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {expected['bytes']}"
    if verify:
        with ThreadPoolExecutor(max_workers=8) as pool:
            digests = pool.map(file_digest, [path / name for name in files])
            for (name, expected), digest in zip(files.items(), digests):
                if digest != expected["sha256"]:
                    return f"{name} does not match its checksum"
    return None


class CheckpointReader:
    """The tensors and the state of one complete checkpoint."""

    def __init__(self, path: Path, storage: RunStorage) -> None:
        self.path = path
        stored = stored_checkpoints(path.parent, storage)
        if stored is not None and (fault := stored.fetch(int(path.name[5:]), path)):
            raise TerraceError(f"checkpoint {stored.uri}/{path.name} cannot be read: {fault}")
        self.state: dict[str, Any] = json.loads((path / "state.json").read_text())
        self._places: dict[str, dict[str, Path]] = {kind: {} for kind in (*KINDS, OBJECTIVE)}
        for kind in self._places:
            for file in sorted(path.glob(f"{kind}-[0-9]*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    self._places[kind].update(dict.fromkeys(opened.keys(), file))

    def names(self, kind: str) -> set[str]:
        return set(self._places[kind])

    def read(self, kind: str, name: str) -> torch.Tensor:
        """One whole tensor on the CPU. Raises TerraceError if the checkpoint lacks it."""
        file = self._places[kind].get(name)
        if file is None:
            raise TerraceError(f"checkpoint {self.path} has no {kind} of {name}: it was saved by another model")
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)


def resume(strategy: Strategy, reader: CheckpointReader) -> None:
    """Put a checkpoint of the same stage into the strategy: weights, optimizer, loss scale."""
    strategy.load_weights(lambda name: reader.read("weights", name))
    strategy.load_optimizer(reader.read, {name: int(n) for name, n in reader.state["optimizer_steps"].items()})
    if reader.names("average"):
        strategy.load_average(lambda name: reader.read("average", name))
    if strategy.loss_scale is not None and reader.state.get("loss_scale"):
        strategy.loss_scale.restore(reader.state["loss_scale"])


def keep_optimizer_state(strategy: Strategy, reader: CheckpointReader, names: list[str]) -> list[str]:
    """Carry the optimizer's state of `names` over from an earlier stage. Returns the names that had none there."""
    held = {kind: reader.names(kind) for kind in KINDS}
    wanted = {name for name in names if all(name in held[kind] for kind in strategy.state_kinds(name))}
    steps = {name: int(n) for name, n in reader.state["optimizer_steps"].items() if name in wanted}
    strategy.load_optimizer(reader.read, steps)
    return [name for name in names if name not in steps]


def previous_checkpoint(start_weights: Path, storage: RunStorage) -> CheckpointReader:
    """The last checkpoint of the stage whose `final/` directory is given. Raises InputError if it is gone."""
    found = newest_complete(start_weights.parent / "checkpoints", storage)
    if found.path is None:
        raise InputError(
            "optimizer_state: keep needs the last checkpoint of the previous stage, but "
            f"{start_weights.parent}/checkpoints has no complete one; set optimizer_state: reset"
        )
    return CheckpointReader(found.path, storage)
