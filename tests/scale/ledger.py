"""An instrument that counts what one rank holds, reads, writes, sends and receives, and ranks as threads of one process.

Bytes are counted where they pass: reads at the system calls of `storage.files` and at the checksums, writes at the files that are there
afterwards, traffic at torch's collectives (every one goes through the dispatcher), memory as the storages that torch makes meanwhile and
that are alive at the same time. Ranks share one process, so 32 of them cost one import; torch's own threaded process group carries their
collectives.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed import multi_threaded_pg as threaded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Ledger:
    """Bytes of one rank in one block."""

    read: int = 0
    written: int = 0
    received: int = 0
    held: int = 0  # at most, at a time, of what was made meanwhile
    alive: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)


_LOCAL = threading.local()


def _current() -> Ledger | None:
    return getattr(_LOCAL, "ledger", None)


class _Watch(TorchDispatchMode):
    """Sees every operation of this thread's tensors."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if function.namespace == "c10d":
            self._ledger.received += _received(function.__name__.partition(".")[0], arguments)
        self._note([leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)])
        return result

    def _note(self, tensors: list[torch.Tensor]) -> None:
        ledger, new = self._ledger, False
        for tensor in tensors:
            if tensor.device.type != "cpu" or type(tensor) is not torch.Tensor:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in ledger.alive or ledger.alive[storage._cdata][0].expired():
                ledger.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                new = True
        if new:
            ledger.alive = {key: entry for key, entry in ledger.alive.items() if not entry[0].expired()}
            ledger.held = max(ledger.held, sum(size for _, size in ledger.alive.values()))


def _received(name: str, arguments: Any) -> int:
    """What a collective brings to a rank: all that it fills but for the rank's own share."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    if "alltoall" in name or "allgather" in name:
        return sum(sizes) // 2 if "alltoall" in name else max(sizes, default=0)
    return 0 if "barrier" in name else max(sizes, default=0)


@contextlib.contextmanager
def counted(ledger: Ledger) -> Iterator[Ledger]:
    """Count what this thread does in the block. `instruments` must be there."""
    _LOCAL.ledger = ledger
    try:
        with _Watch(ledger):
            yield ledger
    finally:
        _LOCAL.ledger = None
        ledger.alive.clear()


@contextlib.contextmanager
def instruments() -> Iterator[None]:
    """Reads and writes of every thread go to its ledger."""
    from terrace.models import export
    from terrace.train import checkpoint, restore

    real_preadv, real_digest, real_save = os.preadv, restore._digest, export.save_file

    def preadv(descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        got = real_preadv(descriptor, buffers, offset, *flags)
        if (ledger := _current()) is not None:
            ledger.read += got
        return got

    def save(tensors: Any, path: Path, metadata: Any = None) -> None:
        real_save(tensors, path, metadata)
        ledger = _current() or _WRITERS.get(threading.get_ident())
        if ledger is not None:
            ledger.written += path.stat().st_size

    def verifying(path: Path, verify: bool, place: str | None, share: tuple[int, int], real: Any = restore.find_fault) -> str | None:
        ledger = _current()

        def digest(uri: str) -> str:  # in threads of a pool
            if ledger is not None:
                ledger.read += os.path.getsize(uri)
            return real_digest(uri)

        with _DIGESTS, mock.patch.object(restore, "_digest", digest):
            return real(path, verify, place, share)

    with (
        mock.patch.object(os, "preadv", preadv), mock.patch.object(checkpoint, "save_file", save),
        mock.patch.object(export, "save_file", save), mock.patch.object(restore, "find_fault", verifying),
    ):
        yield


_DIGESTS = threading.Lock()
_WRITERS: dict[int, Ledger] = {}


def run_threads(ranks: int, work: Callable[[int, int], Any]) -> list[Any]:
    """`work(rank, ranks)` in threads that are ranks of one process group; the results by rank. The first error is raised."""
    results: list[Any] = [None] * ranks
    errors: list[str] = []
    world = threaded._install_threaded_pg()
    store = dist.HashStore()

    def enter(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            results[rank] = work(rank, ranks)
        except BaseException as error:
            errors.append(traceback.format_exc())
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            with contextlib.suppress(BaseException):
                dist.destroy_process_group()

    try:
        threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
    del world
    if errors:
        raise AssertionError(errors[0])
    return results
