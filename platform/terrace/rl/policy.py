"""What the recipe's grpo options choose: who collects the groups of an iteration, and the loss."""

from __future__ import annotations

from terrace.objectives.grpo import PolicyOptions
from terrace.recipe.schema import Stage
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.rl.collect import Collector
from terrace.rl.overlap import OverlappedCollector
from terrace.rl.seamless import SeamlessCollector


def collector_of(options: GrpoOptions) -> type[Collector]:
    """What collects the groups of an iteration."""
    if options.rollout == "rounds":
        return Collector
    return OverlappedCollector if options.overlap is not None and options.overlap.max_staleness > 0 else SeamlessCollector


def policy_options(stage: Stage, options: GrpoOptions, forbidden: tuple[int, ...]) -> PolicyOptions:
    """The loss's part of the recipe. With several updates per rollout the ratio is clipped only if the recipe says
    so."""
    overlap = options.overlap
    return PolicyOptions(
        temperature=options.temperature,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        clip_ceiling=options.clip_ceiling,
        sequence_ratio=options.ratio == "sequence",
        cispo=options.surrogate == "cispo",
        per_response=options.average == "responses",
        correction=None if overlap is None or not overlap.max_staleness or overlap.correction == "none" else overlap.correction,
        correction_bound=overlap.bound if overlap else 2.0,
        correction_masks=overlap is not None and overlap.beyond == "mask",
        kl_coefficient=options.kl_coefficient,
        entropy_coefficient=options.entropy_coefficient,
        forbidden=forbidden,
        chunk_tokens=stage.loss_chunk_tokens,
        one_head_call=stage.parallel.strategy == "zero3",
    )
