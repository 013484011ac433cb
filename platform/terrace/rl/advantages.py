"""Rewards of a group of responses to one prompt -> advantages. Pure numpy.

    A_i = (r_i - b_i) / s        b: mean of the group, of the others in it (leave-one-out), or of the batch
                                 s: std of the group, of the batch, or 1

MORL (MiMo-VL eq. 2) uses mean and std of the group; Dr. GRPO leaves the std out, because it lifts groups that are nearly
all right or all wrong; RLOO uses the mean of the others; REINFORCE++ takes both from the batch, which is all groups of an
update. The std is the unbiased one (n - 1) of the rewards themselves, as verl and TRL have it, plus `epsilon` (verl 1e-6, TRL
1e-4). A response whose reward failed (NaN) is no part of its group: its advantage is 0 and it is excluded.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

EPSILON = 1e-6


def group_advantages(
    rewards: np.ndarray,
    groups: np.ndarray,
    normalise: Literal["std", "batch", "none"] = "std",
    baseline: Literal["mean", "leave_one_out", "batch"] = "mean",
    epsilon: float = EPSILON,
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] advantages and bool [N] `counted`.

    `rewards` float [N], NaN where the reward failed; `groups` int [N], equal numbers for responses to one prompt; the batch
    is all N. A group with fewer than two judged responses has no baseline: none of it counts.
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
    if baseline == "batch":
        advantages = np.where(counted, values - values[judged].mean() if judged.any() else 0.0, 0.0)
    else:
        advantages = centred * (size / (size - 1))[group] if baseline == "leave_one_out" else centred.copy()
    if normalise == "std":
        variance = np.bincount(group, weights=centred**2) / (size - 1)
        advantages /= (np.sqrt(variance) + epsilon)[group]
    elif normalise == "batch":
        advantages /= (values[judged].std(ddof=1) if judged.sum() > 1 else 0.0) + epsilon
    return advantages, counted


def overlong_penalties(lengths: np.ndarray, longest: int, buffer: int, most: float) -> np.ndarray:
    """float64 [N], 0 or below, for responses of these lengths in tokens: DAPO's soft punishment (eq. 13), which falls from 0
    where the last `buffer` tokens before `longest` begin to -`most` at `longest`."""
    beyond = np.asarray(lengths, np.float64) - (longest - buffer)
    return -most * np.clip(beyond / buffer, 0.0, 1.0)


def zero_variance(rewards: np.ndarray) -> bool:
    """Whether a group's judged rewards are all equal (then every advantage is 0), or fewer than two were judged."""
    judged = np.asarray(rewards, np.float64)
    judged = judged[np.isfinite(judged)]
    return len(judged) < 2 or bool(np.ptp(judged) < 1e-9)
