"""An instrument that counts what one rank holds, reads, writes, sends and receives.

Bytes are counted where they pass: reads at the system calls of `storage.files` and at the checksums, writes at the files that are there
afterwards, traffic as what collectives fill, memory as the storages that torch makes meanwhile and that are alive at the same time.
Ranks are threads of one process (`tests/thread_ranks.py`), so every count is a thread's.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
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

    def left(self) -> int:
        """What was made meanwhile and is still there, inside the block, as large as it is now: storages of gathered weights are emptied."""
        there = (torch.UntypedStorage._new_with_weak_ptr(reference.cdata) for reference, _ in self.alive.values())
        return sum(storage.nbytes() for storage in there if storage is not None)


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
        if function.namespace == "c10d":  # of real process groups; those of threads are no operations
            self._ledger.received += _bytes(arguments[0])
        given = {tensor.untyped_storage()._cdata for tensor in _on_host((arguments, options))}
        self._note([tensor for tensor in _on_host(result) if tensor.untyped_storage()._cdata not in given])  # a view makes nothing
        return result

    def _note(self, tensors: list[torch.Tensor]) -> None:
        ledger, new = self._ledger, False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in ledger.alive or ledger.alive[storage._cdata][0].expired():
                ledger.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                new = True
        if new:
            ledger.alive = {key: entry for key, entry in ledger.alive.items() if not entry[0].expired()}
            ledger.held = max(ledger.held, sum(size for _, size in ledger.alive.values()))


def _on_host(values: Any) -> list[torch.Tensor]:
    """The tensors among the values, and this rank's parts of those that are spread over ranks."""
    leaves = (leaf._local_tensor if isinstance(leaf, DTensor) else leaf for leaf in tree_leaves(values))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"]
    return [tensor for tensor in tensors if type(tensor) in (torch.Tensor, torch.nn.Parameter)]


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


COLLECTIVES = (
    "all_gather_single", "all_gather_single_coalesced", "all_to_all_single", "allgather", "allreduce", "allreduce_coalesced", "alltoall",
    "broadcast", "gather", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced", "scatter",
)  # what they fill is their first argument


class _Pool(ThreadPoolExecutor):
    """A pool whose threads count for whoever made it."""

    def __init__(self, max_workers: int | None = None) -> None:
        super().__init__(max_workers, initializer=setattr, initargs=(_LOCAL, "ledger", _current()))


@contextlib.contextmanager
def instruments() -> Iterator[None]:
    """Reads, writes and traffic of every thread go to its ledger."""
    from terrace.models import export, tensor_files
    from terrace.train import checkpoint, restore

    def counting(what: str, real: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            ledger, _LOCAL.ledger = _current(), None  # a collective that is made of others counts once
            try:
                result = real(*arguments, **options)
            finally:
                _LOCAL.ledger = ledger
            if ledger is not None:
                setattr(ledger, what, getattr(ledger, what) + size(result, *arguments))
            return result

        return call

    written = {"what": "written", "size": lambda result, tensors, path, *rest: path.stat().st_size}
    group = threaded.ProcessLocalGroup
    with contextlib.ExitStack() as stack:
        for owner, name, replaced in (
            (os, "preadv", counting("read", os.preadv, lambda got, *rest: got)),
            (restore, "_digest", counting("read", restore._digest, lambda digest, uri: os.path.getsize(uri))),
            (checkpoint, "save_file", counting(real=checkpoint.save_file, **written)),
            (export, "save_file", counting(real=export.save_file, **written)),
            (tensor_files, "ThreadPoolExecutor", _Pool), (restore, "ThreadPoolExecutor", _Pool),
            *((group, name, counting("received", getattr(group, name), lambda work, group, filled=(), *rest: _bytes(filled)))
              for name in COLLECTIVES),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, replaced))
        yield


def _bytes(tensors: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))
