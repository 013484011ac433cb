"""Writing checkpoints: every rank writes the stretches of tensors that it holds, complete only with a manifest.

    step-000120/
      manifest.json                    written last: step, attempt, and the size and sha256 of every other file
      index.json                       which numbers of which parameter lie in which rank's file (train.checkpoint_index)
      state.json                       step, data position, schedule, optimizer steps, hashes, totals
      weights-00000.safetensors …      one file per kind and writing rank, keyed by parameter name
      exp_avg-00000.safetensors …
      exp_avg_sq-00000.safetensors …   (or the state of another optimizer; average-…: of the weights)
      objective-00000.safetensors      the objective's own tensors, where it has any

This is format 2; checkpoints of format 1, whose files hold whole tensors and which have no index, are still read. What a parameter's
numbers are called depends on neither the strategy nor the number of ranks, so any may load what any other saved, and each reads only what
it will hold. Each rank copies its stretches into host memory that is kept for the next time (training waits for that alone; 4 bytes for
each of its numbers), then writes in a thread, one kind after another. Threads use no collective: a rank that has finished leaves a small
report beside its files, and rank 0 waits for all of them, checks that every number was written once and that no younger attempt has taken
over, writes index and manifest and renames the folder. A crash at any moment leaves a folder without a manifest, which loading passes over
by name. Of a run on S3, every rank uploads a file as soon as it is written and keeps no copy, so its disk holds one kind's stretches at a
time; there the last act is the fence's (`checkpoint_storage.py`).
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

from terrace.errors import TerraceError
from terrace.models.tensor_writing import save_file
from terrace.recipe.schema import Checkpoint
from terrace.storage.durable import file_digest, json_bytes, sync_folder, write_durably
from terrace.storage.run_storage import RunStorage
from terrace.train.checkpoint_index import Written, index_values, joined_index
from terrace.train.checkpoint_storage import FENCE, INDEX, MANIFEST, Superseded, folder_name, stored_checkpoints
from terrace.train.optimizers import OPTIMIZER_KINDS, Kind
from terrace.train.retention import superfluous
from terrace.train.staging import Staging
from terrace.train.strategies.interface import Strategy
from terrace.train.strategies.shards import Shard, whole_shard
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
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
        self._staging = Staging()
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
        held = self._copies(strategy, objective)
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

    def _copies(self, strategy: Strategy, objective: Tensors) -> dict[str, list[Shard]]:
        """Host copies of what this rank writes: its own shards, and rank 0 the objective's tensors, which are whole on every rank."""
        held = {kind: self._staging.copies(kind, strategy.shards(kind)) for kind in KINDS}
        own = [whole_shard(name, tensor) for name, tensor in objective]
        held[OBJECTIVE] = self._staging.copies(OBJECTIVE, own) if self._context.rank == 0 else []
        self._staging.wait()
        return held

    def wait(self) -> None:
        """Wait for the write in progress; raises what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _guarded(
        self, step: int, held: dict[str, list[Shard]], state: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        try:
            self._write(step, held, state, metrics)
        except BaseException as error:  # handed to the training thread by wait()
            self._error = error

    def _write(
        self, step: int, held: dict[str, list[Shard]], state: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        rank = self._context.rank
        work = self._folder / f".writing-{folder_name(step)}-attempt-{self._attempt}"
        if self._stored is not None:
            work = work.with_name(f"{work.name}-rank-{rank:05d}")  # ranks of several machines share no disk
        work.mkdir(parents=True, exist_ok=True)
        files: dict[str, dict[str, Any]] = {}
        written: Written = {}
        for kind, shards in held.items():
            if shards:
                name = file_name(kind, rank)
                save_file({shard.name: shard.values.view(shard.shape) if shard.is_whole else shard.values for shard in shards}, work / name)
                written[kind] = {shard.name: (list(shard.shape), shard.start, len(shard.values)) for shard in shards}
                self._finish_file(work / name, files, step)
        if rank != 0:
            self._report(work, step, {"files": files, "written": written})
            return
        write_durably(work / "state.json", json_bytes(state))
        self._finish_file(work / "state.json", files, step)
        others = (self._report_of(other, work, step) for other in range(1, self._context.world_size))
        reports = [{"files": files, "written": written}, *others]
        index, faults = joined_index((number, report["written"]) for number, report in enumerate(reports))
        if faults:
            raise CheckpointFailed(f"step {step}: the ranks' parts do not make whole tensors: {'; '.join(faults[:4])}")
        files = {name: facts for report in reports for name, facts in report["files"].items()}
        (work / INDEX).write_text(json.dumps(index_values(index), separators=(",", ":")))
        self._finish_file(work / INDEX, files, step)
        manifest = {"format_version": FORMAT_VERSION, "step": step, "attempt": self._attempt, "files": files, "metrics": metrics}
        write_durably(work / MANIFEST, json_bytes(manifest))
        if self._stored is not None:
            self._complete_stored(work, step, metrics)
        else:
            self._complete(work, step)

    def _finish_file(self, file: Path, files: dict[str, dict[str, Any]], step: int) -> None:
        """Have a written file on the disk to stay, or on S3 and no more here, and note its size and checksum."""
        files[file.name] = _describe(file)
        if self._stored is not None:
            self._stored.upload(file, step, self._attempt)
            file.unlink()

    def _report(self, work: Path, step: int, content: dict[str, Any]) -> None:
        """Tell rank 0 that this rank's files are there."""
        report = work / f"report-{self._context.rank:05d}.json"
        write_durably(report, json.dumps(content, separators=(",", ":")).encode())
        if self._stored is not None:
            self._stored.upload(report, step, self._attempt)
            shutil.rmtree(work)

    def _report_of(self, rank: int, work: Path, step: int) -> dict[str, Any]:
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


def file_name(kind: str, rank: int) -> str:
    """The file of a rank's stretches of one kind."""
    return f"{kind}-{rank:05d}.safetensors"


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
