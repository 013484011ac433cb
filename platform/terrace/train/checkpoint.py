"""Writing checkpoints: whole tensors by parameter name, spread over the ranks as files, complete only with a manifest.

    step-000120/
      manifest.json                    written last: step, attempt, and the size and sha256 of every other file
      state.json                       step, data position, schedule, optimizer steps, hashes, totals
      weights-00000.safetensors …      one file per kind and writing rank, keyed by parameter name
      exp_avg-00000.safetensors …
      exp_avg_sq-00000.safetensors …   (or the state of another optimizer; average-…: of the weights)
      objective-00000.safetensors      the objective's own tensors, where it has any

Neither the strategy nor the number of ranks leaves a trace in the format, so any may load what any other saved. Each
rank copies the tensors it owns to host memory (training waits for that alone), then writes in a thread. Threads use
no collective: a rank that has finished leaves a small report beside its files, and rank 0 waits for all of them,
checks that no younger attempt has taken over, writes the manifest and renames the folder. A crash at any moment
leaves a folder without a manifest, which loading passes over by name. Of a run on S3, every rank uploads what it wrote
and keeps no copy; there the last act is the fence's (`checkpoint_storage.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from terrace.errors import TerraceError
from terrace.recipe.schema import Checkpoint
from terrace.storage.durable import file_digest, json_bytes, sync_folder, write_durably
from terrace.storage.run_storage import RunStorage
from terrace.train.checkpoint_storage import FENCE, MANIFEST, Superseded, folder_name, stored_checkpoints
from terrace.train.optimizers import OPTIMIZER_KINDS, Kind
from terrace.train.retention import superfluous
from terrace.train.strategies.interface import Strategy
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
KINDS: tuple[Kind, ...] = ("weights", *OPTIMIZER_KINDS, "average")
OBJECTIVE = "objective"  # the objective's own tensors, beside those kinds
Tensors = Iterable[tuple[str, torch.Tensor]]
REPORT_TIMEOUT_S = 1800.0


class CheckpointFailed(TerraceError):
    """A checkpoint could not be written; the previous one is still there."""


class CheckpointWriter:
    """Writes the checkpoints of one attempt at one stage. `save` and `finish` are called by every rank."""

    def __init__(
        self, folder: Path, options: Checkpoint, context: WorkerContext, attempt: int, storage: RunStorage
    ) -> None:
        self._storage = storage
        self._folder, self._options, self._context, self._attempt = folder, options, context, attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stored = stored_checkpoints(folder, self._storage)
        if context.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            if self._stored is not None:
                self._stored.raise_fence(attempt)
                self._stored.remove_remains(attempt)
            else:
                _raise_fence(folder, attempt)
            for stale in folder.glob(".writing-*"):
                shutil.rmtree(stale, ignore_errors=True)

    def save(
        self, strategy: Strategy, state: dict[str, Any], metrics: Mapping[str, float], objective: Tensors = ()
    ) -> Path:
        """Copy this rank's tensors and write them, in the background where the recipe allows. Returns the final folder.

        `metrics` are what was measured at the step: they decide which checkpoint is the best. `objective` is its own state.
        """
        self.wait()
        held = _owned_tensors(strategy, objective, self._context)
        step = int(state["step"])
        state = {"format_version": FORMAT_VERSION, "attempt": self._attempt, **state}
        state["optimizer_steps"] = strategy.optimizer_steps()
        self._thread = threading.Thread(
            target=self._guarded, args=(step, held, state, dict(metrics)), name=f"checkpoint-{step}", daemon=True
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

    def _guarded(
        self, step: int, held: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        try:
            self._write(step, held, state, metrics)
        except BaseException as error:  # handed to the training thread by wait()
            self._error = error

    def _write(
        self, step: int, held: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        rank = self._context.rank
        work = self._folder / f".writing-{folder_name(step)}-attempt-{self._attempt}"
        if self._stored is not None:
            work = work.with_name(f"{work.name}-rank-{rank:05d}")  # ranks of several machines share no disk
        work.mkdir(parents=True, exist_ok=True)
        files: dict[str, dict[str, Any]] = {}
        for kind, tensors in held.items():
            if tensors:
                name = f"{kind}-{rank:05d}.safetensors"
                save_file(tensors, work / name)
                files[name] = _describe(work / name)
        if rank == 0:
            write_durably(work / "state.json", json_bytes(state))
            files["state.json"] = _describe(work / "state.json")
        if self._stored is not None:
            for name in files:
                self._stored.upload(work / name, step, self._attempt)
        if rank != 0:
            self._report(work, step, files)
            return
        for other in range(1, self._context.world_size):
            files.update(self._report_of(other, work, step))
        manifest = {"format_version": FORMAT_VERSION, "step": step, "attempt": self._attempt, "files": files, "metrics": metrics}
        write_durably(work / MANIFEST, json_bytes(manifest))
        if self._stored is not None:
            self._complete_stored(work, step, metrics)
        else:
            self._complete(work, step)

    def _report(self, work: Path, step: int, files: dict[str, dict[str, Any]]) -> None:
        """Tell rank 0 that this rank's files are there."""
        report = work / f"report-{self._context.rank:05d}.json"
        write_durably(report, json_bytes(files))
        if self._stored is not None:
            self._stored.upload(report, step, self._attempt)
            shutil.rmtree(work)

    def _report_of(self, rank: int, work: Path, step: int) -> dict[str, dict[str, Any]]:
        name = f"report-{rank:05d}.json"
        if self._stored is None:
            content = _await_file(work / name)
            (work / name).unlink(missing_ok=True)
        else:
            content = self._stored.await_report(name, step, self._attempt, REPORT_TIMEOUT_S)
        if content is None:
            raise CheckpointFailed(f"step {step}: rank {rank} has not written its part of {work} in {REPORT_TIMEOUT_S:.0f} s")
        return json.loads(content)

    def _complete(self, work: Path, step: int) -> None:
        """Give the folder its name, unless a younger attempt has taken over, and remove what need not stay."""
        final = self._folder / folder_name(step)
        with _fenced(self._folder, self._attempt):
            if final.exists():  # an incomplete or older one of the same step
                shutil.rmtree(final)
            work.rename(final)
            sync_folder(self._folder)
            metrics = {}
            for path in self._folder.glob(f"step-*/{MANIFEST}"):
                metrics[int(path.parent.name[5:])] = json.loads(path.read_text()).get("metrics", {})
            for old in superfluous(metrics, self._options, step):
                folder = self._folder / folder_name(old)
                # The manifest goes first, so that a half-removed folder counts as incomplete.
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)

    def _complete_stored(self, work: Path, step: int, metrics: dict[str, float]) -> None:
        """The same on S3: manifest, the metrics up to this step, the fence; copies on this disk go."""
        stored = self._stored
        assert stored is not None
        stored.upload(work / MANIFEST, step, self._attempt)
        self._storage.flush(self._folder)
        stored.commit(step, self._attempt, (work / MANIFEST).read_bytes(), metrics)
        complete = {number: entry.metrics for number, entry in stored.complete().items()}
        stored.drop(superfluous(complete, self._options, step), self._attempt)
        shutil.rmtree(work)
        for copy in self._folder.glob("step-*"):
            shutil.rmtree(copy, ignore_errors=True)


def _owned_tensors(strategy: Strategy, objective: Tensors, context: WorkerContext) -> dict[str, dict[str, torch.Tensor]]:
    """Host copies of the tensors that this rank writes: each of the strategy's goes to the rank with the fewest bytes so
    far, the objective's (whole on every rank) to rank 0."""
    held: dict[str, dict[str, torch.Tensor]] = {}
    load = [0] * context.world_size
    for kind in KINDS:
        held[kind] = {}
        for name, tensor in strategy.tensors(kind):
            owner = load.index(min(load))
            load[owner] += tensor.numel() * tensor.element_size()
            if owner == context.rank:
                # clone, because training goes on changing the original while the thread writes
                held[kind][name] = tensor.detach().to("cpu", copy=True).contiguous()
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in objective}
    held[OBJECTIVE] = own if context.rank == 0 else {}
    return held


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _await_file(path: Path) -> bytes | None:
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while not path.is_file():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)
    return path.read_bytes()


def _raise_fence(folder: Path, attempt: int) -> None:
    """Declare this attempt the youngest. Raises Superseded if a younger one has declared itself."""
    with _fenced(folder, attempt):
        write_durably(folder / FENCE, json_bytes({"attempt": attempt}))


@contextlib.contextmanager
def _fenced(folder: Path, attempt: int) -> Iterator[None]:
    """A block during which no younger attempt can declare itself. Raises Superseded if one has already."""
    with open(folder / ".attempt.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fence = folder / FENCE
        youngest = int(json.loads(fence.read_text())["attempt"]) if fence.is_file() else 0
        if youngest > attempt:
            raise Superseded(f"attempt {attempt} may not write to {folder}: attempt {youngest} has taken over")
        yield
