"""What a stage runs forward beside its training passes: for a reference, a divergence, a key encoder, vectors that must meet first.

A pass is counted in whole packs, each as many FLOPs as the forward of a training pass. Views of pictures count their teacher by
themselves (planner.views).
"""

from __future__ import annotations

from dataclasses import dataclass

from terrace.data.family import balance_weight
from terrace.families.registry import family_class
from terrace.planner.work import Work
from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.schema_preference import DpoOptions

REFERRING = ("dpo", "mpo", "kto")


@dataclass(frozen=True)
class Passes:
    """`in_step`: forward passes of every pack in every step. `of_reference`: of every row that the stage sees, once before its first
    step. `told`: a line for each."""

    in_step: float
    of_reference: float
    told: list[str]


def passes_beside(recipe: Recipe, stage: Stage, workers: int, work: Work) -> Passes:
    several = stage.batch.packs * stage.parallel.sequence_parallel > workers
    other_answer = 1.0 - 0.5 * work.pack.supervised_tokens / work.pack.tokens  # a prompt with one answer, of a row with two
    in_step, of_reference, told = 0.0, 0.0, []
    if _counts_experts_first(recipe, stage) and several:
        in_step += 1
        told.append("its packs run forward once more, to count what the experts of the whole batch get: expert_balance 0 spares that")
    if stage.objective in ("clip", "siglip") and several:
        in_step += 1
        told.append("its packs run forward once more, for the vectors of the whole batch: a pack for each worker spares that")
    if stage.objective == "matching":
        keys = stage.matching is not None and stage.matching.momentum is not None
        in_step += 1 + keys
        told.append("its packs run forward first for what meets in the batch" + (", and once more through the key encoder" if keys else ""))
    if stage.objective == "kto":
        in_step += other_answer
        told.append("each prompt runs forward once more in every step, with the answer to another one, for the divergence")
    if stage.objective == "grpo" and stage.grpo is not None and stage.grpo.kl_coefficient > 0:
        in_step += 1
        told.append("answers run forward once more through the reference of the KL penalty")
    if stage.objective in REFERRING and not (stage.dpo or DpoOptions()).reference_free:
        of_reference = 1.0 + (other_answer if stage.objective == "kto" else 0.0)
        told.append("one forward pass over every row for the reference, before the first step, is part of its time")
    return Passes(in_step, of_reference, told)


def _counts_experts_first(recipe: Recipe, stage: Stage) -> bool:
    """Whether a load-balancing loss over the whole batch takes a forward pass of its own (objectives.experts)."""
    family = family_class(recipe.model.architecture)
    return family.experts and not family.balances_sequences and balance_weight(recipe, stage) > 0


def rows_of_reference(work: Work) -> float | None:
    """Rows whose reference is computed: each that the stage draws once, whatever its epochs. None: unknown without an index."""
    if work.samples is None:
        return None
    return sum((source.samples or 0.0) / max(1.0, source.epochs or 1.0) for source in work.sources.values())
