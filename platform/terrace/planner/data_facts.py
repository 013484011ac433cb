"""What an index tells the plan about a source: samples that train, and their mean tokens, squares and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from terrace.recipe.schema import Recipe, Stage
from terrace.recipe.stretches import stretches


@dataclass(frozen=True)
class SampleMeans:
    """Means over samples. Squares are sums over a sample's segments and images, as attention meets them."""

    tokens: float
    supervised_tokens: float
    token_squares: float
    visual_tokens: float
    image_squares: float  # of visual tokens
    bytes: float

    def scaled(self, factor: float) -> SampleMeans:
        return SampleMeans(*(getattr(self, field.name) * factor for field in fields(self)))


@dataclass(frozen=True)
class SourceFacts:
    samples: int  # that train
    means: SampleMeans
    others: Mapping[tuple[int, int], SourceFacts] = field(default_factory=dict)  # at other bounds on pixels, of a stage with changes

    def at(self, pixels: tuple[int, int]) -> SourceFacts:
        """The facts at some bounds of the stage."""
        return self.others.get(pixels, self)


def source_facts(index: Any, stage: Stage, max_visual_tokens_per_image: int | None) -> SourceFacts:
    """The facts of one source (a data.source_index.SourceIndex) at the stage's resolution."""
    import numpy as np

    most = stage.pixels.max
    if max_visual_tokens_per_image is not None:
        most = max(stage.pixels.min, min(most, max_visual_tokens_per_image * index.family.unit))
    pixels = (stage.pixels.min, most)
    rows = index.train_rows
    lengths = index.lengths(pixels)[rows].astype(np.float64)
    fitting = lengths <= stage.sequence_length  # longer ones are refused, split or reduced: none meets attention whole
    lengths = np.minimum(lengths, stage.sequence_length)
    visual = index.visual_tokens(pixels)[rows].astype(np.float64)
    images = np.maximum(1, np.diff(index.starts["image"])[rows])
    sizes = np.concatenate([[0], np.cumsum(index.columns["member_size"], dtype=np.int64)])
    starts = index.starts["member"]
    payload = sizes[starts[1:]] - sizes[starts[:-1]]
    if not len(rows):
        return SourceFacts(0, SampleMeans(0, 0, 0, 0, 0, 0))
    return SourceFacts(
        samples=int(fitting.sum()),
        means=SampleMeans(
            tokens=float(lengths.mean()),
            supervised_tokens=float(index.supervised_tokens[rows].mean()),
            token_squares=float((lengths**2).mean()),
            visual_tokens=float(visual.mean()),
            image_squares=float((visual**2 / images).mean()),
            bytes=float(payload[rows].mean()),
        ),
    )


def load_facts(recipe: Recipe, root: Path) -> list[dict[str, SourceFacts]]:
    """Per stage, the facts of its sources from prepared data in `root`. Raises InputError where there is none."""
    from terrace.data.prepare import load_prepared, stage_data

    prepared = load_prepared(root)

    def facts_of(indexes: Mapping[str, Any], name: str, stage: Stage) -> SourceFacts:
        limit = recipe.data.sources[name].max_visual_tokens_per_image
        others = {(part.pixels.min, part.pixels.max): source_facts(indexes[name], part, limit) for _, part in stretches(stage)[1:]}
        return replace(source_facts(indexes[name], stage, limit), others=others)

    views = [stage_data(recipe, index, prepared)[1].indexes for index in range(len(recipe.stages))]
    return [
        {name: facts_of(indexes, name, stage) for name in stage.mixture.weights if name in indexes}
        for stage, indexes in zip(recipe.stages, views)
    ]
