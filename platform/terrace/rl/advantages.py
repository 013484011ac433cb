"""Rewards of a group of responses to one prompt -> advantages. Pure numpy.

    A_i = (r_i - b_i) / s        b: mean of the group, or of the others (leave-one-out);  s: std of the group, or 1

MORL (MiMo-VL eq. 2) uses mean and std; Dr. GRPO leaves the std out, because it lifts groups that are nearly all right
or all wrong; RLOO uses the mean of the others. The std is the unbiased one (n - 1), as verl and TRL have it, plus
`epsilon` (verl 1e-6, TRL 1e-4). A response whose reward failed (NaN) is no part of its group: its advantage is 0 and it
is excluded.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

EPSILON = 1e-6


def group_advantages(
    rewards: np.ndarray,
    groups: np.ndarray,
    normalise: Literal["std", "none"] = "std",
    baseline: Literal["mean", "leave_one_out"] = "mean",
    epsilon: float = EPSILON,
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] advantages and bool [N] `counted`.

    `rewards` float [N], NaN where the reward failed; `groups` int [N], equal numbers for responses to one prompt. A
    group with fewer than two judged responses has no baseline: none of it counts.
    """
    rewards = np.asarray(rewards, np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    judged = np.isfinite(rewards)
    values = np.where(judged, rewards, 0.0)
    count = np.bincount(group, weights=judged.astype(np.float64))
    total = np.bincount(group, weights=values)
    counted = judged & (count[group] >= 2)
    size = np.maximum(count, 2.0)
    mean = total / size
    centred = np.where(counted, values - mean[group], 0.0)
    advantages = centred * (size / (size - 1))[group] if baseline == "leave_one_out" else centred.copy()
    if normalise == "std":
        variance = np.bincount(group, weights=centred**2) / (size - 1)
        advantages /= (np.sqrt(variance) + epsilon)[group]
    return advantages, counted


def zero_variance(rewards: np.ndarray) -> bool:
    """Whether a group's judged rewards are all equal (then every advantage is 0), or fewer than two were judged."""
    judged = np.asarray(rewards, np.float64)
    judged = judged[np.isfinite(judged)]
    return len(judged) < 2 or bool(np.ptp(judged) < 1e-9)
