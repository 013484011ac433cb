"""What of a run's sources was refused, in the same words for the terminal, the journal, the report and `terrace status`."""

from __future__ import annotations

from collections.abc import Mapping


def refused_sentences(refused: Mapping[str, Mapping[str, int]], kept: Mapping[str, int]) -> list[str]:
    """One sentence for each source of `refused` (source: {reason: samples}). `kept`: samples by source that are left to train on."""
    found = []
    for name, reasons in refused.items():
        count = sum(reasons.values())
        counted = ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())
        found.append(f"{name}: {count:,} of {count + kept.get(name, 0):,} samples left out, refused ({counted})")
    return found
