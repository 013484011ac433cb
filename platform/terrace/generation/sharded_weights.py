"""Weights of a rollout engine that no rank holds whole: each keeps its part of every layer, and a layer is whole while it runs.

Ranks decode different prompts, so they run different numbers of steps, prefills and pictures, while gathering a layer takes all of them.
Before a layer is gathered the ranks therefore agree which: each says the layer that it wants next, or that it has finished, and the
first of those in the model's order is gathered by all. A rank that wanted another one lets it go and asks again, so those behind catch up
and then go on together. The agreement knows nothing of what is being decoded: any model, and any order of calls, is served.

What is decoded does not change, only what is held: per rank the model divided by the ranks, and the largest layer. It costs a model
through the network for every step of decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from terrace.errors import TerraceError
from terrace.models.build import restore_buffers
from terrace.models.families.registry import family_of_model, output_layer
from terrace.models.parts import transformer_blocks
from terrace.models.patch_products import PatchProduct
from terrace.worker.context import WorkerContext

FAILED = -1
MULTIPLY = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d, PatchProduct)  # whose weights nothing reads but their own forward


@dataclass
class Stretch:
    """Tensors of one type one after another: whole in `flat` while their layer runs, filled up so that all ranks' parts are as long."""

    flat: torch.Tensor  # [ranks * part]
    part: torch.Tensor  # this rank's

    def gather(self) -> None:
        resize(self.flat, self.flat.nbytes)
        dist.all_gather_single(self.flat, self.part)

    def put(self, first: int, values: torch.Tensor, rank: int) -> None:
        """Take what this rank keeps of `values`, which begin at number `first` of `flat`."""
        size = len(self.part)
        begin, end = max(first, rank * size), min(first + len(values), (rank + 1) * size)
        if begin < end:
            self.part[begin - rank * size : end - rank * size].copy_(values[begin - first : end - first])


@dataclass
class Layer:
    """What is gathered at a time. `users`: modules that run just now and read it."""

    stretches: list[Stretch]
    users: int = 0

    def gather(self) -> None:
        for stretch in self.stretches:
            stretch.gather()

    def release(self) -> None:
        for stretch in self.stretches:
            resize(stretch.flat, 0)


class ShardedWeights:
    """See copies.Weights. Of a model on the meta device, changed in place; all ranks make it, renew it and decode with it together."""

    def __init__(self, model: Any, context: WorkerContext) -> None:
        self.model = model
        self.precisions = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._context = context
        self._layers: list[Layer] = []
        self._rest: list[torch.Tensor] = []  # whole on every rank: norms, position tables
        self._places: dict[str, tuple[Stretch | None, int, torch.Tensor]] = {}  # by name: in which stretch, from which number on; itself
        self._together = self._apart = False
        self._divide()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty_like(buffer, device=context.device)
        restore_buffers(model)
        self.release()

    # ------------------------------------------------------------ what copies.Weights asks for

    def reserve(self) -> None:
        for tensor in self._kept():
            resize(tensor, tensor.nbytes)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        stretch, first, own = self._places[name]
        if stretch is None:
            own.copy_(tensor)
        else:
            stretch.put(first, tensor.reshape(-1), self._context.rank)

    def release(self) -> None:
        for layer in self._layers:
            layer.release()
        for tensor in self._kept():
            resize(tensor, 0)

    def _kept(self) -> Iterator[torch.Tensor]:
        yield from self._rest
        yield from (stretch.part for layer in self._layers for stretch in layer.stretches)

    # ------------------------------------------------------------ ranks in step

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks enter, decode what each has, be it nothing, and leave once the last has finished."""
        self._together, self._apart = True, False
        try:
            yield
            self._serve(None)
        except BaseException:
            if not self._apart:
                with suppress(Exception):  # what is raised is the reason, not that the others cannot be told
                    self._agreed(FAILED)
            raise
        finally:
            self._together = False

    def _serve(self, wanted: int | None) -> None:
        """Gather with the other ranks until layer `wanted` is whole; None: until all of them have finished."""
        if not self._together:
            raise TerraceError("an engine with its weights in shards decodes on all ranks together")
        number = len(self._layers) if wanted is None else wanted
        while (agreed := self._agreed(number)) != number or wanted is not None:
            if agreed == FAILED:
                self._apart = True
                raise TerraceError("another rank could not go on decoding, and no rank can alone: see that rank's error")
            layer = self._layers[agreed]
            layer.gather()
            if agreed == wanted:
                return
            if not layer.users:
                layer.release()

    def _agreed(self, number: int) -> int:
        """The first of what the ranks want."""
        first = torch.tensor([number], device=self._context.device)
        dist.all_reduce(first, dist.ReduceOp.MIN)
        return int(first)

    def _before(self, numbers: list[int]) -> Callable[..., None]:
        def gather(*_: Any) -> None:
            for number in numbers:
                if not self._layers[number].users:
                    self._serve(number)
                self._layers[number].users += 1

        return gather

    def _after(self, numbers: list[int]) -> Callable[..., None]:
        def release(*_: Any) -> None:
            for number in numbers:
                layer = self._layers[number]
                layer.users = max(0, layer.users - 1)  # fewer were counted where gathering itself failed
                if not layer.users:
                    layer.release()

        return release

    # ------------------------------------------------------------ the parts

    def _divide(self) -> None:
        """Blocks, embeddings, the output layer, other linear layers and convolutions are gathered as they run; what little is left is
        whole on every rank."""
        model = self.model
        names = {id(tensor): name for name, tensor in model.named_parameters()}
        layers: dict[int, int] = {}  # number by tensor
        made: dict[int, torch.nn.Parameter] = {}
        blocks = transformer_blocks(model)
        inside = {id(module) for block in blocks for module in block.modules()}
        others = [module for module in model.modules() if type(module) in MULTIPLY and id(module) not in inside]
        for module in dict.fromkeys([*blocks, family_of_model(model).language(model).embed_tokens, output_layer(model), *others]):
            fresh = [tensor for tensor in module.parameters() if id(tensor) not in layers]
            if fresh:
                layers |= dict.fromkeys(map(id, fresh), len(self._layers))
                self._layers.append(Layer([self._stretch(alike, names, made) for alike in _by_type(fresh)]))
            numbers = sorted({layers[id(tensor)] for tensor in module.parameters()})
            module.register_forward_pre_hook(self._before(numbers))
            module.register_forward_hook(self._after(numbers), always_call=True)
        for tensor in model.parameters():
            if id(tensor) not in made:
                made[id(tensor)] = _parameter(torch.empty_like(tensor, device=self._context.device))
                self._rest.append(made[id(tensor)])
                self._places[names[id(tensor)]] = (None, 0, made[id(tensor)])
        for module in model.modules():
            module._parameters |= {name: made[id(tensor)] for name, tensor in module._parameters.items() if tensor is not None}

    def _stretch(self, tensors: Sequence[torch.Tensor], names: Mapping[int, str], made: dict[int, torch.nn.Parameter]) -> Stretch:
        """One after another, with the parameters that show them while they are whole."""
        ranks, kind = self._context.world_size, {"dtype": tensors[0].dtype, "device": self._context.device}
        size = -(-sum(tensor.numel() for tensor in tensors) // ranks)
        stretch, first = Stretch(torch.empty(size * ranks, **kind), torch.empty(size, **kind)), 0
        for tensor in tensors:
            made[id(tensor)] = _parameter(stretch.flat[first : first + tensor.numel()].view(tensor.shape))
            self._places[names[id(tensor)]] = (stretch, first, made[id(tensor)])
            first += tensor.numel()
        resize(stretch.flat, 0)
        return stretch


def resize(tensor: torch.Tensor, size: int) -> None:
    """The bytes that a tensor's storage has: none, or its own again. Views of it stay."""
    if tensor.untyped_storage().nbytes() != size:
        tensor.untyped_storage().resize_(size)


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _by_type(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    return [[tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dict.fromkeys(tensor.dtype for tensor in tensors)]
