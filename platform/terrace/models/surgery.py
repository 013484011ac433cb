"""What a stage changes in the weights it starts from: learned positions of a tower stretched over another grid, dense layers copied
into experts.

A change is made while weights are read, tensor by tensor, so every strategy takes it like any other tensor, and a stage that
is resumed, whose checkpoint has the changed tensors, never makes it again.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from terrace.models.families.interface import FamilyModel
from terrace.models.tensor_files import Directory
from terrace.recipe.schema_changes import ModelChanges


class Surgery:
    """The changes of one stage, between the directory it starts from and its own skeleton."""

    def __init__(self, changes: ModelChanges | None, skeleton: Any, family: FamilyModel) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        resized = changes is not None and changes.interpolate_positions is not None
        self._tables = {name: shapes[name] for name in family.position_tables(shapes)} if resized else {}
        adds = changes is not None and changes.add_tokens is not None
        self._rows = {name: shapes[name] for name in (family.embedding, family.head) if adds and name in shapes}
        upcycles = changes is not None and changes.upcycle is not None
        self._experts = {name: (shapes[name][0], sources) for name in shapes if upcycles and (sources := family.dense_sources(name))}
        self._routers = {f"{name.rpartition('.')[0]}.gate.weight" for name in self._experts}
        self.used_up = {source for _, sources in self._experts.values() for source in sources}  # of the dense model

    def note(self, directory: Directory, name: str, shape: tuple[int, ...]) -> str | None:
        """What happens to a tensor, in words; None where it is taken as it is."""
        if name in self._experts and name not in directory.names and directory.names.issuperset(self._experts[name][1]):
            return f"{name} begins as {shape[0]} copies of {' and '.join(self._experts[name][1])}"
        if name in self._routers and name not in directory.names:
            return f"{name} is new and starts random"
        if self._grows(directory, name):
            return f"{name} grows from {directory.shape(name)[0]} to {shape[0]} rows; the new ones begin as the mean of the others"
        if name not in self._tables or name not in directory.names or (found := directory.shape(name)) == shape:
            return None
        if found[-1] != shape[-1]:
            return None
        return f"{name} is stretched from {found[-2]} to {shape[-2]} positions (bicubic)"

    def _grows(self, directory: Directory, name: str) -> bool:
        if name not in self._rows or name not in directory.names:
            return False
        found, wanted = directory.shape(name), self._rows[name]
        return found[1:] == wanted[1:] and found[0] < wanted[0]

    def makes(self, name: str) -> bool:
        """Whether a tensor that a directory lacks is made from others."""
        return name in self._experts

    def read(self, directory: Directory, name: str) -> torch.Tensor:
        if name in self._experts and name not in directory.names:
            count, sources = self._experts[name]
            dense = torch.cat([directory.read(source) for source in sources])
            return dense.expand(count, *dense.shape).contiguous()
        tensor = directory.read(name)
        if self._grows(directory, name):
            new = self._rows[name][0] - len(tensor)
            return torch.cat([tensor, tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype).expand(new, -1)])
        wanted = self._tables.get(name)
        return tensor if wanted is None or tuple(tensor.shape) == wanted else stretched_positions(tensor, wanted)


def stretched_positions(table: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Positions [..., N, W] of a square grid, behind those of other tokens (a class token), on the grid that `shape` has room for:
    bicubic in float32, as ViTs are moved to another resolution. Positions of other tokens stay as they are."""
    rows, width = table.reshape(-1, table.shape[-1]).float(), table.shape[-1]
    old, new = len(rows), math.prod(shape[:-1])
    side, wanted = math.isqrt(old), math.isqrt(new)
    others = old - side * side
    if new - wanted * wanted != others:
        raise ValueError(f"{old} positions cannot be stretched to {new}: both must be a square grid and the same other tokens")
    grid = rows[others:].view(1, side, side, width).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([rows[:others], resized.permute(0, 2, 3, 1).reshape(-1, width)]).view(shape).to(table.dtype)
