"""Held-out samples of a stage, packed per kind: what its loss is measured on before and after.

The samples are those that `holdout_samples` keeps out of training, of every source in the stage's mixture. The same
packs come out for any number of workers and at any time of the run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from terrace.data.order.eligible import Fitting
from terrace.data.order.fixed import fixed_groups
from terrace.data.order.items import EligibleSource, Items
from terrace.data.order.packing import pack_best_fit
from terrace.data.order.permutation import permute, seed_of
from terrace.data.order.stored import stored_source
from terrace.data.stream.tasks import TaskSettings, make_pack, pack_task
from terrace.data.types import PackedExample, PackSpec, SampleRef
from terrace.recipe.objectives import OBJECTIVES
from terrace.recipe.schema import Recipe
from terrace.recipe.stretches import last_stretch


def held_out_packs(
    recipe: Recipe, stage_index: int, prepared: Any, max_samples_per_kind: int | None = None
) -> dict[str, list[PackedExample]]:
    """Packs of held-out samples by kind, at the sequence length and resolution of the stage's end; kinds without any are left out.

    `max_samples_per_kind` (default: the stage's `evaluate.max_samples_per_kind`) is shared between a kind's sources.
    """
    specs = held_out_specs(recipe, stage_index, prepared, max_samples_per_kind)
    settings = TaskSettings.of(recipe, stage_index, prepared)
    return {
        kind: [make_pack(part, settings) for part in pack_task(kind_specs, settings).parts]
        for kind, kind_specs in specs.items()
    }


def held_out_specs(
    recipe: Recipe, stage_index: int, prepared: Any, max_samples_per_kind: int | None = None
) -> dict[str, list[PackSpec]]:
    """The packs of `held_out_packs`, by reference."""
    stage = recipe.stages[stage_index]
    end = last_stretch(stage).pixels  # of a stage that changes inside, so that before and after are measured alike
    most = max_samples_per_kind or stage.evaluate.max_samples_per_kind
    rule = OBJECTIVES[stage.objective]
    wanted = Fitting((end.min, end.max), stage.sequence_length, stage.data_loading.max_visual_tokens_per_pack, rule.needs_targets)
    by_kind: dict[str, list[EligibleSource]] = {}
    for name in stage.mixture.weights:
        index = prepared.indexes[name]
        if index.choice.held_out:
            source = recipe.data.sources[name]
            if source.too_long == "split":  # one item per held-out sample
                source = source.model_copy(update={"too_long": "truncate_text"})
            kept = stored_source(name, source, index, wanted, rule.fixed_packs, held_out=True)
            if kept.count:
                by_kind.setdefault(source.kind, []).append(kept)
    return {kind: _pack_kind(sources, most, recipe.data.seed, stage) for kind, sources in sorted(by_kind.items())}


def _pack_kind(sources: list[EligibleSource], most: int, seed: int, stage: Any) -> list[PackSpec]:
    """At most `most` samples, in turn from each source, in a seeded order."""
    chosen: list[tuple[EligibleSource, Items]] = []
    orders = [permute(np.arange(min(most, s.count)), s.count, seed_of(seed, "held out", s.name)) for s in sources]
    for turn in range(min(most, max(s.count for s in sources))):
        for source, order in zip(sources, orders):
            if turn < source.count and len(chosen) < most:
                chosen.append((source, source.take(order[turn : turn + 1])))
    column = {name: [int(getattr(items, name)[0]) for _, items in chosen] for name in Items.__dataclass_fields__}
    lengths, visual = np.asarray(column["lengths"]), np.asarray(column["visual_tokens"])
    end = last_stretch(stage).pixels
    if OBJECTIVES[stage.objective].fixed_packs:
        packs = fixed_groups(len(chosen), stage.batch.samples_per_pack)
    else:
        packs = pack_best_fit(lengths, stage.sequence_length, visual, stage.data_loading.max_visual_tokens_per_pack)
    return [
        PackSpec(
            pack=number,
            samples=tuple(
                SampleRef(chosen[m][0].name, column["rows"][m], chosen[m][0].id_of(column["rows"][m])) for m in members
            ),
            lengths=tuple(column["lengths"][m] for m in members),
            visual_tokens=tuple(column["visual_tokens"][m] for m in members),
            pixel_rows=sum(column["pixel_rows"][m] for m in members),
            window=0,
            pixels_max=tuple(column["pixels_max"][m] for m in members),
            spans=tuple(None if column["stops"][m] < 0 else (column["starts"][m], column["stops"][m]) for m in members),
            pixels=None if end == stage.pixels else (end.min, end.max),
        )
        for number, members in enumerate(packs)
    ]
