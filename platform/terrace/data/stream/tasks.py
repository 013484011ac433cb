"""One decode task: read the samples of some packs, decode, encode and pack them. Runs on any CPU of the cluster.

A task carries the pack specifications and the byte ranges of their samples, so a worker needs neither the recipe nor
the index: a few hundred bytes per sample instead of gigabytes of columns on every node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from terrace.data.index.source_index import SampleLocation, locate
from terrace.data.order.spares import PackSpares, SparesOf
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.stream.collate import CollateSettings, LoadedSample, collate
from terrace.data.stream.read import read_located
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.data.types import PackedExample, PackSpec, SampleRef
from terrace.errors import DamagedData
from terrace.recipe.schema import Recipe


@dataclass(frozen=True)
class PackPart:
    """A pack's specification and where the bytes of its samples lie."""

    spec: PackSpec
    locations: tuple[SampleLocation, ...]
    spares: PackSpares = ()  # per sample, who may stand in for it


@dataclass(frozen=True)
class PackTask:
    """The packs that one task makes, in order."""

    parts: tuple[PackPart, ...]


@dataclass(frozen=True)
class TaskSettings:
    """What every task of a stage shares; `indexes` stays in the planning process."""

    collate: CollateSettings
    indexes: Any = None
    index_folders: Mapping[str, str] = field(default_factory=dict)  # of sources with `on_damage: skip`

    @classmethod
    def of(cls, recipe: Recipe, stage_index: int, prepared: Any) -> TaskSettings:
        stage, data = recipe.stages[stage_index], recipe.data
        names = list(stage.mixture.weights)
        return cls(
            CollateSettings(
                tokenizer_dir=str(prepared.tokenizer_dir),
                family=prepared.family,
                pixels=(stage.pixels.min, stage.pixels.max),  # a pack behind a change brings its own
                sequence_length=stage.sequence_length,
                max_image_pixels=data.max_image_pixels,
                supervise={name: data.sources[name].supervise for name in names},
                skip_damaged=frozenset(name for name in names if data.sources[name].on_damage == "skip"),
            ),
            prepared.indexes,
            {name: prepared.indexes[name].folder for name in names if data.sources[name].on_damage == "skip"},
        )

    def without_indexes(self) -> TaskSettings:
        return TaskSettings(self.collate, None, self.index_folders)


def pack_task(specs: Sequence[PackSpec], settings: TaskSettings, spares_of: SparesOf | None = None) -> PackTask:
    """A task with the byte ranges of its samples looked up. Without `spares_of` a damaged sample leaves a gap."""
    indexes = settings.indexes
    places = [tuple(indexes[ref.source].location(ref.row) for ref in spec.samples) for spec in specs]
    spares = [spares_of(spec) if spares_of else () for spec in specs]
    return PackTask(tuple(PackPart(*part) for part in zip(specs, places, spares)))


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
    replacements = partial(_replacements, part, settings) if part.spares else None
    return collate(part.spec, loaded, _tokenizer(settings.collate.tokenizer_dir), settings.collate, replacements)


def _replacements(part: PackPart, settings: TaskSettings, place: int) -> Iterator[tuple[PackSpec, LoadedSample]]:
    """Samples that can be read and may stand at a damaged one's place of the pack, each as a pack of its own."""
    source, storage = part.spec.samples[place].source, part.locations[place].storage
    for spare in part.spares[place]:
        location = locate(settings.index_folders[source], spare.row, storage)
        [result] = read_located([location])
        if isinstance(result, DamagedData):
            continue
        sample, images = result
        resolve_coordinates(sample.messages, location.sizes)
        alone = replace(spare.alone(part.spec), samples=(SampleRef(source, spare.row, location.id),))
        yield alone, LoadedSample(sample, images, location.sizes)


@lru_cache(maxsize=2)
def _tokenizer(directory: str) -> TextTokenizer:
    return load_tokenizer(directory)
