"""A pack on its way to the device: uint8 patches become normalised float patches there, one copy per kind of tensor.

Pixels travel as uint8 (an eighth of the bytes of what the model reads: float32 and doubled in time) and are
normalised on the device with Qwen's mean and standard deviation. Whatever the host must know (segment lengths, image
grids, which rows are supervised) is computed from numpy before the copy, so that a step does not wait for the device
to answer.

Shape letters: L tokens, S segments, I images, P 14x14 patches, N supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from terrace.data.types import PATCH_SIZE, PATCH_VALUES, PackedExample

if TYPE_CHECKING:
    from terrace.models.sequence_parallel import SequenceShard

# Mean and standard deviation of the RGB values that Qwen2-VL's image processor uses (those of CLIP).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
TEMPORAL_PATCH_SIZE = 2  # a still image fills both frames of a temporal patch


@dataclass
class DeviceBatch:
    """One pack as `models.forward` takes it. An empty pack has one token that is not supervised, so that it still
    runs."""

    example: PackedExample  # host side: names for error messages, grids, kinds
    input_ids: torch.Tensor  # int64 [1, L]
    position_ids: torch.Tensor  # int64 [4, 1, L]
    boundaries: list[int]  # S + 1 places, from 0 to L
    cu_seqlens: torch.Tensor  # int32 [S + 1], the same on the device
    longest: int  # tokens of the longest segment
    supervised_rows: torch.Tensor  # int64 [N]: places in [0, L) with a target
    targets: torch.Tensor  # int64 [N]
    pixel_values: torch.Tensor | None  # dtype [P, 3 * 2 * 14 * 14]; None where the pack has no image
    image_grids: torch.Tensor | None  # int64 [I, 3] on the host
    sequence: SequenceShard | None = None  # with sequence parallelism: L, N and P are this rank's, segments the pack's

    @property
    def device(self) -> torch.device:
        return self.input_ids.device


def normalise_patches(
    patches: torch.Tensor, dtype: torch.dtype, frames: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """uint8 [R, 588] -> dtype [P, 1176]: (x / 255 - mean) / std per channel in float32, two frames in time.

    Without `frames` every row is a patch of a still image and fills both (R = P); with them, the rows of the first and
    of the second frame of each patch, int64 [P] each.
    """
    scale = 1.0 / (255.0 * torch.tensor(IMAGE_STD, device=patches.device))
    shift = torch.tensor(IMAGE_MEAN, device=patches.device) / torch.tensor(IMAGE_STD, device=patches.device)
    values = patches.view(-1, 3, 1, PATCH_SIZE * PATCH_SIZE).float()
    values = values * scale.view(1, 3, 1, 1) - shift.view(1, 3, 1, 1)
    values = values.to(dtype)
    still = values.expand(-1, 3, TEMPORAL_PATCH_SIZE, -1)
    doubled = still if frames is None else torch.cat([values[rows] for rows in frames], dim=2)
    return doubled.reshape(-1, PATCH_VALUES * TEMPORAL_PATCH_SIZE)


def frame_rows(example: PackedExample) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows of `patches` that hold the first and second frame of each patch; None where the pack has no video."""
    if not example.video_grids:
        return None
    first, second, start = [], [], 0
    for number, grid in enumerate(example.image_grids):
        patches = int(grid.prod())
        frames = TEMPORAL_PATCH_SIZE if number in example.video_grids else 1
        rows = start + frames * np.arange(patches)
        first.append(rows)
        second.append(rows + frames - 1)
        start += frames * patches
    return np.concatenate(first), np.concatenate(second)


def to_device(example: PackedExample, device: torch.device | str, dtype: torch.dtype) -> DeviceBatch:
    """Move a pack to the device. `dtype` is that of the pixel values (the compute precision)."""
    device = torch.device(device)

    def move(array: np.ndarray, kind: torch.dtype) -> torch.Tensor:
        tensor = torch.as_tensor(np.ascontiguousarray(array))
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True).to(kind)

    empty = example.tokens == 0
    ids = np.zeros(1, np.int32) if empty else example.input_ids
    positions = np.zeros((4, 1), np.int32) if empty else example.position_ids
    targets = np.full(1, -100, np.int32) if empty else example.targets
    boundaries = [0, 1] if empty else [0, *(int(end) for end in example.segment_ends)]
    if boundaries[-1] != len(ids):
        raise ValueError(f"pack {example.pack}: segments end at {boundaries[-1]}, the pack has {len(ids)} tokens")
    rows = np.flatnonzero(targets >= 0)
    has_images = len(example.image_grids) > 0
    rows_of_frames = frame_rows(example)
    frames = None
    if rows_of_frames is not None:
        frames = (move(rows_of_frames[0], torch.int64), move(rows_of_frames[1], torch.int64))
    return DeviceBatch(
        example=example,
        input_ids=move(ids, torch.int64).unsqueeze(0),
        position_ids=move(positions, torch.int64).unsqueeze(1),
        boundaries=boundaries,
        cu_seqlens=move(np.asarray(boundaries, np.int32), torch.int32),
        longest=int(np.diff(boundaries).max()),
        supervised_rows=move(rows, torch.int64),
        targets=move(targets[rows], torch.int64),
        pixel_values=normalise_patches(move(example.patches, torch.uint8), dtype, frames) if has_images else None,
        image_grids=torch.from_numpy(example.image_grids.astype(np.int64)) if has_images else None,
    )
