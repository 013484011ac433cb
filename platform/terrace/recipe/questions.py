"""Values that may be meant and hardly ever are: magnitudes of which one asks before a run is paid for. Nothing here is refused."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import PARTS, Recipe, Stage

# (key of a stage, least and most that are usual). Outside of it one asks.
USUAL: tuple[tuple[tuple[str, ...], float, float], ...] = (
    (("budget", "steps"), 1, 1e8), (("budget", "tokens"), 1, 1e14), (("budget", "samples"), 1, 1e11), (("budget", "epochs"), 1e-4, 1e3),
    (("batch", "packs"), 1, 1e5), (("sequence_length",), 16, 2**21), (("pixels", "max"), 196, 2**28),
    (("optimizer", "weight_decay"), 0, 1), (("optimizer", "eps"), 1e-16, 1e-3), (("optimizer", "clip"), 1e-4, 1e4),
    (("checkpoint", "keep_last"), 1, 1e4), (("data_loading", "prefetch_packs"), 1, 1e4), (("data_loading", "window_samples"), 1, 1e7),
    (("loss_chunk_tokens",), 1, 1e7), (("failure", "max_restarts"), 0, 1e4), (("failure", "backoff_seconds"), 0, 86_400),
)  # fmt: skip
RATES = (1e-9, 0.5)
MOST_OF_LARS = 50  # whose rates are multiplied by a layer's ratio of norms; papers have up to 0.3 for every 256 samples of a batch
MOST_WORKERS = 20_000
MOST_RATIO = 1e6  # of two weights of a mixture


def questions(recipe: Recipe) -> list[Problem]:
    """One line for each value that is far from any that is usual."""
    return [question for index, stage in enumerate(recipe.stages) for question in _stage(stage, ("stages", index))]


def _stage(stage: Stage, at: Path) -> Iterator[Problem]:
    least, most = RATES[0], MOST_OF_LARS if stage.optimizer.kind == "lars" else RATES[1]
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is not None and not least <= training.lr <= most:
            yield Problem((*at, "train", part, "lr"), f"is {training.lr:g} meant? Learning rates lie between {least:g} and {most:g}")
    for path, least, most in USUAL:
        value = stage
        for step in path:
            value = getattr(value, step, None)
        if isinstance(value, int | float) and not least <= value <= most:
            yield Problem((*at, *path), f"is {value:g} meant? Usual are values from {least:g} to {most:g}")
    workers = stage.resources.workers
    if (count := workers if isinstance(workers, int) else workers[1]) > MOST_WORKERS:
        yield Problem((*at, "resources", "workers"), f"are {count:,} workers meant?")
    weights = {name: weight for name, weight in stage.mixture.weights.items() if weight > 0}
    if weights and max(weights.values()) > MOST_RATIO * min(weights.values()):
        rare = min(weights, key=lambda name: weights[name])
        yield Problem((*at, "mixture", "weights", rare), f"is {weights[rare]:g} meant? Others have more than a million times that")
