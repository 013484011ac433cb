"""Writing a safetensors file straight from the tensors' memory: the library's own writer makes a copy of all of them first.

The bytes are those that it would write: a header padded to eight bytes, tensors by falling width of their numbers and then by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from terrace.models.tensor_files import DTYPES

_ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")  # of the library, among equals in width


def save_file(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of host memory under their names."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    ranks = {name: place for place, name in enumerate(_ORDER)}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), -ranks.get(kinds[tensors[name].dtype], 0), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in order:
            if tensors[name].numel():
                file.write(memoryview(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
