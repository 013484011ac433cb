"""One decode task: read the samples of some packs, decode, encode and pack them. Runs on any CPU of the cluster.

A task carries the pack specifications and the byte ranges of their samples, so a worker needs neither the recipe nor
the index: a few hundred bytes per sample instead of gigabytes of columns on every node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from terrace.data.collate import CollateSettings, LoadedSample, collate
from terrace.data.placeholders import resolve_coordinates
from terrace.data.positions import TOKENS_PER_SECOND
from terrace.data.read import read_located
from terrace.data.source_index import SampleLocation
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.data.types import PackedExample, PackSpec
from terrace.errors import DamagedData
from terrace.recipe.schema import Recipe


@dataclass(frozen=True)
class PackPart:
    """A pack's specification and where the bytes of its samples lie."""

    spec: PackSpec
    locations: tuple[SampleLocation, ...]


@dataclass(frozen=True)
class PackTask:
    """The packs that one task makes, in order."""

    parts: tuple[PackPart, ...]


@dataclass(frozen=True)
class TaskSettings:
    """What every task of a stage shares; `indexes` stays in the planning process."""

    collate: CollateSettings
    indexes: Any = None

    @classmethod
    def of(cls, recipe: Recipe, stage_index: int, prepared: Any) -> TaskSettings:
        stage, data = recipe.stages[stage_index], recipe.data
        vision = (recipe.model.config or {}).get("vision_config") or {}
        names = list(stage.mixture.weights)
        return cls(
            CollateSettings(
                tokenizer_dir=str(prepared.tokenizer_dir),
                pixels=(stage.pixels.min, stage.pixels.max),
                sequence_length=stage.sequence_length,
                max_image_pixels=data.max_image_pixels,
                supervise={name: data.sources[name].supervise for name in names},
                skip_damaged=frozenset(name for name in names if data.sources[name].on_damage == "skip"),
                tokens_per_second=float(vision.get("tokens_per_second", TOKENS_PER_SECOND)),
            ),
            prepared.indexes,
        )

    def without_indexes(self) -> TaskSettings:
        return TaskSettings(self.collate)


def pack_task(specs: Sequence[PackSpec], settings: TaskSettings) -> PackTask:
    """A task with the byte ranges of its samples looked up."""
    indexes = settings.indexes
    places = [tuple(indexes[ref.source].location(ref.row) for ref in spec.samples) for spec in specs]
    return PackTask(tuple(PackPart(spec, locations) for spec, locations in zip(specs, places)))


def run_task(task: PackTask, settings: TaskSettings) -> Iterator[PackedExample]:
    """The task's packs, one after another, so that a finished one can travel while the next is decoded."""
    for part in task.parts:
        yield make_pack(part, settings)


def make_pack(part: PackPart, settings: TaskSettings) -> PackedExample:
    """Read and build one pack."""
    loaded: list[LoadedSample | DamagedData] = []
    for location, result in zip(part.locations, read_located(part.locations)):
        if isinstance(result, DamagedData):
            loaded.append(result)
            continue
        sample, images = result
        resolve_coordinates(sample.messages, location.sizes)
        loaded.append(LoadedSample(sample, images, location.sizes))
    return collate(part.spec, loaded, _tokenizer(settings.collate.tokenizer_dir), settings.collate)


@lru_cache(maxsize=2)
def _tokenizer(directory: str) -> TextTokenizer:
    return load_tokenizer(directory)
