"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Mapping

from terrace.recipe.schema import Checkpoint


def superfluous(metrics: Mapping[int, Mapping[str, float]], options: Checkpoint, newest: int) -> list[int]:
    """Steps of the complete checkpoints (given with what was measured at each) that need not stay.

    Those that stay: the newest, the last `keep_last`, multiples of `keep_every_steps`, and the one with the best
    `best_metric` (of equals the later one).
    """
    steps = sorted(metrics)
    kept = {newest, *steps[-options.keep_last :]}
    if options.keep_every_steps:
        kept |= {step for step in steps if step % options.keep_every_steps == 0}
    values = {step: metrics[step][options.best_metric] for step in steps if options.best_metric in metrics[step]}
    if values:
        best = min(values.values()) if options.best_is == "lowest" else max(values.values())
        kept.add(max(step for step, value in values.items() if value == best))
    return [step for step in steps if step not in kept]
