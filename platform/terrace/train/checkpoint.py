"""Writing checkpoints: whole tensors by parameter name, spread over the ranks as files, complete only with a manifest.

    step-000120/
      manifest.json                    written last: step, attempt, and the size and sha256 of every other file
      state.json                       step, data position, schedule, optimizer steps, hashes, totals
      weights-00000.safetensors …      one file per kind and writing rank, keyed by parameter name
      exp_avg-00000.safetensors …
      exp_avg_sq-00000.safetensors …

Neither the strategy nor the number of ranks leaves a trace in the format, so any may load what any other saved. Each
rank copies the tensors it owns to host memory (training waits for that alone), then writes in a thread. Threads use
no collective: a rank that has finished leaves a small report beside its files, and rank 0 waits for all of them,
checks that no younger attempt has taken over, writes the manifest and renames the folder. A crash at any moment
leaves a folder without a manifest, which loading passes over by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from terrace.errors import TerraceError
from terrace.recipe.schema import Checkpoint
from terrace.train.context import WorkerContext
from terrace.train.strategies.interface import OPTIMIZER_KINDS, Kind, Strategy

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
KINDS: tuple[Kind, ...] = ("weights", *OPTIMIZER_KINDS)
REPORT_TIMEOUT_S = 1800.0
FENCE = "attempt.json"


class CheckpointFailed(TerraceError):
    """A checkpoint could not be written; the previous one is still there."""


class Superseded(TerraceError):
    """A younger attempt of the same stage has taken over; this one must not write any more."""


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def write_durably(path: Path, content: bytes) -> None:
    """Write and fsync a file under a temporary name, then rename it, so that it is whole or absent."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut; file systems that cannot sync folders are left as they are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


class CheckpointWriter:
    """Writes the checkpoints of one attempt at one stage. `save` and `finish` are called by every rank."""

    def __init__(self, folder: Path, options: Checkpoint, context: WorkerContext, attempt: int) -> None:
        self._folder, self._options, self._context, self._attempt = folder, options, context, attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if context.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _raise_fence(folder, attempt)
            for stale in folder.glob(".writing-*"):
                shutil.rmtree(stale, ignore_errors=True)

    def save(self, strategy: Strategy, state: dict[str, Any]) -> Path:
        """Copy this rank's tensors and write them, in the background where the recipe allows. Returns the final
        folder."""
        self.wait()
        held = _owned_tensors(strategy, self._context)
        step = int(state["step"])
        state = {"format_version": FORMAT_VERSION, "attempt": self._attempt, **state}
        state["optimizer_steps"] = strategy.optimizer_steps()
        self._thread = threading.Thread(
            target=self._guarded, args=(step, held, state), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        if not self._options.asynchronous:
            self.wait()
        return self._folder / folder_name(step)

    def wait(self) -> None:
        """Wait for the write in progress; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _guarded(self, step: int, held: dict[Kind, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        try:
            self._write(step, held, state)
        except BaseException as error:  # handed to the training thread by wait()
            self._error = error

    def _write(self, step: int, held: dict[Kind, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        work = self._folder / f".writing-{folder_name(step)}-attempt-{self._attempt}"
        work.mkdir(parents=True, exist_ok=True)
        files: dict[str, dict[str, Any]] = {}
        for kind, tensors in held.items():
            if tensors:
                name = f"{kind}-{self._context.rank:05d}.safetensors"
                save_file(tensors, work / name)
                files[name] = _describe(work / name)
        if self._context.rank != 0:
            write_durably(work / f"report-{self._context.rank:05d}.json", json_bytes(files))
            return
        write_durably(work / "state.json", json_bytes(state))
        files["state.json"] = _describe(work / "state.json")
        for rank in range(1, self._context.world_size):
            files.update(_await_report(work / f"report-{rank:05d}.json", rank))
            (work / f"report-{rank:05d}.json").unlink()
        self._complete(work, step, files)

    def _complete(self, work: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        _check_fence(self._folder, self._attempt)
        manifest = {"format_version": FORMAT_VERSION, "step": step, "attempt": self._attempt, "files": files}
        write_durably(work / "manifest.json", json_bytes(manifest))
        final = self._folder / folder_name(step)
        if final.exists():  # an incomplete or older one of the same step
            shutil.rmtree(final)
        work.rename(final)
        sync_folder(self._folder)
        self._remove_old(step)

    def _remove_old(self, newest: int) -> None:
        """Keep the last `keep_last` complete checkpoints and every `keep_every_steps`-th."""
        steps = sorted(int(path.parent.name[5:]) for path in self._folder.glob("step-*/manifest.json"))
        kept = set(steps[-self._options.keep_last :]) | {newest}
        every = self._options.keep_every_steps
        for step in steps:
            if step not in kept and not (every and step % every == 0):
                folder = self._folder / folder_name(step)
                # The manifest goes first, so that a half-removed folder counts as incomplete.
                (folder / "manifest.json").unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def _owned_tensors(strategy: Strategy, context: WorkerContext) -> dict[Kind, dict[str, torch.Tensor]]:
    """Host copies of the tensors that this rank writes: each goes to the rank with the fewest bytes so far."""
    held: dict[Kind, dict[str, torch.Tensor]] = {}
    load = [0] * context.world_size
    for kind in KINDS:
        held[kind] = {}
        for name, tensor in strategy.tensors(kind):
            owner = load.index(min(load))
            load[owner] += tensor.numel() * tensor.element_size()
            if owner == context.rank:
                # clone, because training goes on changing the original while the thread writes
                held[kind][name] = tensor.detach().to("cpu", copy=True).contiguous()
    return held


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _await_report(path: Path, rank: int) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while not path.is_file():
        if time.monotonic() > deadline:
            raise CheckpointFailed(f"rank {rank} has not written its part to {path.parent} in {REPORT_TIMEOUT_S:.0f} s")
        time.sleep(0.02)
    return json.loads(path.read_text())


def _raise_fence(folder: Path, attempt: int) -> None:
    """Declare this attempt the youngest. Raises Superseded if a younger one has declared itself."""
    _check_fence(folder, attempt)
    write_durably(folder / FENCE, json_bytes({"attempt": attempt}))


def _check_fence(folder: Path, attempt: int) -> None:
    fence = folder / FENCE
    if fence.is_file():
        youngest = int(json.loads(fence.read_text())["attempt"])
        if youngest > attempt:
            raise Superseded(f"attempt {attempt} may not write to {folder}: attempt {youngest} has taken over")
