"""Weights from the trainer to vLLM's worker: a stream of tensors through a socket of this machine, never a file.

The trainer sends each tensor as it gets it, in the precision in which vLLM computes; the worker (`vllm_worker`) reads it straight into
vLLM's loader, so on both sides one tensor at a time exists beside the model. What goes over is a line of JSON (name, format, shape) and
the tensor's bytes: nothing is unpickled. The socket lies in a folder that the user alone may enter, and lives for one hand-over.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from terrace.errors import TerraceError

TICK_SECONDS = 0.2
SOCKET = "weights"  # of the private folder


class WeightStream:
    """The trainer's end. `take(address)` has the worker take weights from the socket, and returns when it has them all."""

    def __init__(self, folder: Path, take: Callable[[str], Any]) -> None:
        """Raises what `take` raises before it listens."""
        self._address = folder / SOCKET
        self._address.unlink(missing_ok=True)
        self._error: BaseException | None = None
        self._connection: socket.socket | None = None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._address))
            listener.listen(1)
            listener.settimeout(TICK_SECONDS)
            self._taking = threading.Thread(target=self._take, args=(take,), name="vllm-weights", daemon=True)
            self._taking.start()
            while self._connection is None:
                try:
                    self._connection, _ = listener.accept()
                except TimeoutError:
                    if not self._taking.is_alive():
                        raise self._why() from self._error
            self._connection.settimeout(None)
        finally:
            listener.close()
            self._address.unlink(missing_ok=True)

    def _take(self, take: Callable[[str], Any]) -> None:
        try:
            take(str(self._address))
        except BaseException as error:
            self._error = error

    def send(self, name: str, tensor: torch.Tensor) -> None:
        """One tensor, on any device. Raises what the worker's side raised."""
        held = tensor.detach().to("cpu").contiguous()
        header = json.dumps({"name": name, "dtype": str(held.dtype).removeprefix("torch."), "shape": list(held.shape)}).encode()
        self._all(len(header).to_bytes(4, "big") + header)
        if held.numel():
            self._all(memoryview(held.reshape(-1).view(torch.uint8).numpy()))

    def finish(self) -> None:
        """That was all: wait until the worker has them. Raises what its side raised."""
        self._all((0).to_bytes(4, "big"))
        self._taking.join()
        self.close()
        if self._error is not None:
            raise self._why() from self._error

    def close(self) -> None:
        """Give up. The worker's side ends with an error if it has not all. May be called twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _all(self, data: bytes | memoryview) -> None:
        assert self._connection is not None
        try:
            self._connection.sendall(data)
        except OSError as error:  # the worker has ended, or has refused a tensor
            self.close()
            self._taking.join(TICK_SECONDS * 50)
            raise self._why() from (self._error or error)

    def _why(self) -> BaseException:
        if isinstance(self._error, TerraceError):
            return self._error
        return TerraceError(f"engine vllm: it did not take the policy's weights ({self._error or 'its process closed the connection'})")


def received(connection: socket.socket) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that `WeightStream` sends, until it says that there are no more. Raises ConnectionError if it ends before."""
    while size := int.from_bytes(_exactly(connection, 4), "big"):
        said = json.loads(bytes(_exactly(connection, size)))
        dtype, shape = getattr(torch, said["dtype"]), torch.Size(said["shape"])
        data = _exactly(connection, shape.numel() * dtype.itemsize)
        tensor = torch.frombuffer(data, dtype=dtype).view(shape) if shape.numel() else torch.empty(shape, dtype=dtype)
        yield said["name"], tensor


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count:
        got = connection.recv_into(view[filled:])
        if not got:
            raise ConnectionError("the trainer's end of the weights was closed before all were there")
        filled += got
    return data
