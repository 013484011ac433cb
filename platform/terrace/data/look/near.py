"""Pictures that look the same though their files differ: 64 bits of each, and which of them differ in a few.

The print of a picture is its difference hash: resized to 9 x 8 grey levels, each bit says whether a level is higher than its right
neighbour. Another size, compression or format changes a few bits at most; a flat picture has no print, since all of those are alike. Two
prints that differ in at most three bits agree in one of their four quarters, so only pictures that share a quarter are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from terrace.data.image_files import ImageDamage
from terrace.data.images import FilePicture
from terrace.data.index.source_index import SourceIndex
from terrace.data.stream.read import read_located
from terrace.errors import DamagedData

NEAR_BITS = 3
_READ_TOGETHER = 64
_FLATTEST = 6.0  # grey levels of spread that a picture must have
_QUARTERS = (0, 16, 32, 48)
_COMPARED_TOGETHER = 4_096


def picture_print(data: bytes) -> int | None:
    """The print of a picture's file; None for a flat picture, or one that cannot be decoded."""
    try:
        levels = FilePicture(data).planes(8, 9).astype(np.float64).mean(0)
    except ImageDamage:
        return None
    if levels.std() < _FLATTEST:
        return None
    return int.from_bytes(np.packbits((levels[:, :-1] > levels[:, 1:]).ravel()).tobytes())


def source_prints(index: SourceIndex) -> np.ndarray:
    """uint64: the prints of a source's pictures, each once. Reads and decodes all of them (about 2 ms each)."""
    return np.unique(np.asarray(list(_prints(index)), np.uint64))


def _prints(index: SourceIndex) -> Iterator[int]:
    starts = index.starts["image"]
    rows = np.flatnonzero(starts[1:] > starts[:-1]).tolist()
    for start in range(0, len(rows), _READ_TOGETHER):
        for result in read_located([index.location(row) for row in rows[start : start + _READ_TOGETHER]]):
            if isinstance(result, DamagedData):
                continue  # told when it is trained
            for image in result[1]:
                found = picture_print(image)
                if found is not None:
                    yield found


def near_ones(prints: np.ndarray, others: np.ndarray) -> int:
    """How many of `others` are within NEAR_BITS of one of `prints`; both uint64 and without repeats."""
    near = np.zeros(len(others), bool)
    for shift in _QUARTERS:
        own = (prints >> np.uint64(shift)) & np.uint64(0xFFFF)
        order = np.argsort(own, kind="stable")
        sorted_own, sorted_prints = own[order], prints[order]
        wanted = (others >> np.uint64(shift)) & np.uint64(0xFFFF)
        first, last = np.searchsorted(sorted_own, wanted, "left"), np.searchsorted(sorted_own, wanted, "right")
        for number in np.flatnonzero((last > first) & ~near).tolist():
            for start in range(int(first[number]), int(last[number]), _COMPARED_TOGETHER):
                some = sorted_prints[start : min(start + _COMPARED_TOGETHER, int(last[number]))]
                if (np.bitwise_count(some ^ others[number]) <= NEAR_BITS).any():
                    near[number] = True
                    break
    return int(near.sum())
