"""Dynamic sampling (DAPO, MiMo-7B): a group without differences teaches nothing and is replaced, keeping the batch
size.

An iteration draws prompts in rounds until `wanted` informative groups are there or the rounds are used up. The first
`wanted` in the order of the draw are kept; later ones are surplus and dropped, because training on them in the next
iteration would be off-policy. How many prompts a round draws follows from the share kept so far, so a task where 41 %
of the groups are informative costs about two rounds and little surplus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from terrace.rl.advantages import zero_variance

LARGEST_ROUND = 3.0  # a round draws at most this many times the groups that are missing


@dataclass(frozen=True)
class Selection:
    """Places of the groups (in the order they were drawn) that are kept, and counts of the others."""

    kept: tuple[int, ...]
    without_difference: int
    unjudged: int  # fewer than two rewards: failures
    surplus: int
    missing: int


def select_groups(rewards: Sequence[np.ndarray], wanted: int, dynamic: bool) -> Selection:
    """Choose among groups of rewards (float [G], NaN for failures). Without `dynamic` the first `wanted` judged
    ones."""
    informative, without_difference, unjudged = [], 0, 0
    for place, group in enumerate(rewards):
        if np.isfinite(group).sum() < 2:
            unjudged += 1
        elif dynamic and zero_variance(group):
            without_difference += 1
        else:
            informative.append(place)
    kept = tuple(informative[:wanted])
    return Selection(kept, without_difference, unjudged, len(informative) - len(kept), wanted - len(kept))


def prompts_to_draw(missing: int, kept: int, drawn: int) -> int:
    """Prompts of the next round: what is missing over the share kept so far (at first: as many as are missing)."""
    if missing <= 0:
        return 0
    share = max(kept / drawn, 1 / LARGEST_ROUND) if drawn else 1.0
    return math.ceil(missing / share)
