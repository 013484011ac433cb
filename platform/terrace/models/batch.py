"""A pack on its way to the device: uint8 pixels as they are, one copy per kind of tensor.

Pixels travel as uint8 (an eighth of the bytes of what the model reads: float32 and doubled in time) and are normalised
on the device by the family. Whatever the host must know (segment lengths, facts of images, which rows are supervised) is
computed from numpy before the copy, so that a step does not wait for the device to answer.

Shape letters: L tokens, S segments, I images, R rows of pixels, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from terrace.data.types import PackedExample, PromptInputs

MOST_POSITION_ROWS = 4  # of any family, for a pack without tokens


@dataclass(frozen=True)
class ImageFacts:
    """The host's side of a batch's images, int64 tensors."""

    facts: torch.Tensor  # [I, k]: `image_facts` of data.types.PackedExample
    tokens: torch.Tensor  # [I]
    rows: torch.Tensor  # [I]


@dataclass
class DeviceBatch:
    """One pack as `models.forward` takes it. An empty pack has one token that is not supervised, so that it still runs."""

    example: PackedExample  # host side: names for error messages, facts, kinds
    input_ids: torch.Tensor  # int64 [1, L]
    position_ids: torch.Tensor  # int64 [P, 1, L]
    boundaries: list[int]  # S + 1 places, from 0 to L
    cu_seqlens: torch.Tensor  # int32 [S + 1], the same on the device
    longest: int  # tokens of the longest segment
    supervised_rows: torch.Tensor  # int64 [N]: places in [0, L) with a target
    targets: torch.Tensor  # int64 [N]
    pixels: torch.Tensor | None  # uint8 [R, values of a row]; None where the pack has no image
    image_facts: ImageFacts | None  # on the host
    dtype: torch.dtype  # that pixels are normalised to: the compute precision
    sequence: Any = None  # models.sequence_parallel.SequenceShard: L, N and R are then this rank's, segments the pack's

    @property
    def device(self) -> torch.device:
        return self.input_ids.device


def to_device(example: PackedExample, device: torch.device | str, dtype: torch.dtype) -> DeviceBatch:
    """Move a pack to the device. `dtype` is the compute precision."""
    device = torch.device(device)

    def move(array: np.ndarray, kind: torch.dtype) -> torch.Tensor:
        tensor = torch.as_tensor(np.ascontiguousarray(array))
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True).to(kind)

    empty = example.tokens == 0
    ids = np.zeros(1, np.int32) if empty else example.input_ids
    positions = np.zeros((MOST_POSITION_ROWS, 1), np.int32) if empty else example.position_ids
    targets = np.full(1, -100, np.int32) if empty else example.targets
    boundaries = [0, 1] if empty else [0, *(int(end) for end in example.segment_ends)]
    if boundaries[-1] != len(ids):
        raise ValueError(f"pack {example.pack}: segments end at {boundaries[-1]}, the pack has {len(ids)} tokens")
    rows = np.flatnonzero(targets >= 0)
    has_images = len(example.image_rows) > 0
    return DeviceBatch(
        example=example,
        input_ids=move(ids, torch.int64).unsqueeze(0),
        position_ids=move(positions, torch.int64).unsqueeze(1),
        boundaries=boundaries,
        cu_seqlens=move(np.asarray(boundaries, np.int32), torch.int32),
        longest=int(np.diff(boundaries).max()),
        supervised_rows=move(rows, torch.int64),
        targets=move(targets[rows], torch.int64),
        pixels=move(example.pixels, torch.uint8) if has_images else None,
        image_facts=image_facts(example) if has_images else None,
        dtype=dtype,
    )


def image_facts(example: PackedExample | PromptInputs) -> ImageFacts:
    """The host's side of the images of a pack or a prompt."""
    return ImageFacts(*(
        torch.from_numpy(values.astype(np.int64)) for values in (example.image_facts, example.image_tokens, example.image_rows)
    ))  # fmt: skip
