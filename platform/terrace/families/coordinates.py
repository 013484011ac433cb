"""Coordinates of an original image in whole units of what the model sees, and how many digits they take."""

from __future__ import annotations

import numpy as np


def scaled_coordinate(value: float, original: int, scale: int) -> int:
    """round(value * scale / original), halves to even, clamped to [0, scale - 1]: Qwen2.5-VL's own data preparation."""
    return max(0, min(round(value * (scale / original)), scale - 1))


def scaled_coordinates(values: np.ndarray, originals: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`scaled_coordinate` of many: int64 [C]."""
    scaled = np.rint(np.asarray(values, np.float64) * (np.asarray(scales, np.float64) / originals))
    return np.clip(scaled, 0, np.asarray(scales, np.float64) - 1).astype(np.int64)


def count_digits(values: np.ndarray) -> np.ndarray:
    """Decimal digits of non-negative whole numbers below a million. Elementwise; int64."""
    values = np.asarray(values)
    return 1 + sum((values >= 10**power).astype(np.int64) for power in range(1, 6))
