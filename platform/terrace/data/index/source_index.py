"""One source's index: columns on disk, and every length at any resolution as arithmetic on them.

The columns are mapped and shared by the processes of a machine (`mapped`), and nothing is in memory that nobody asked for: `part` gives
a stretch of rows as a small index of its own, in memory, and whatever concerns all rows goes through these. Lists of a sample
(images, coordinates, files) are flat columns with start positions, so that `lengths` of a million samples takes about a tenth of a
second and reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from terrace.data.index.build import load_summary
from terrace.data.index.choice import Choice, Wanted, make_choice
from terrace.data.index.columns import CHUNK, Strings
from terrace.data.index.content import content_hashes
from terrace.data.index.mapped import IDS, KIND, LISTS, SCALARS, STARTS, index_columns
from terrace.data.sources.ingest import shard_uri
from terrace.data.template import Measure
from terrace.errors import InputError
from terrace.families.interface import Bounds, Costs, Family
from terrace.recipe.schema import Storage
from terrace.storage.files import join, open_sequential
from terrace.storage.s3 import DEFAULT_STORAGE


@dataclass(frozen=True)
class SampleLocation:
    """Where one sample's bytes lie: enough to read and check it anywhere, a few hundred bytes to send."""

    source: str
    row: int
    id: str
    kind: str
    shard: str
    members: tuple[tuple[str, int, int, int], ...]  # (suffix, offset, size, crc)
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each image
    storage: Storage = DEFAULT_STORAGE
    ignore: tuple[str, ...] = ()  # the source's settings of reading, for samples in tars that Terrace did not write
    placeholders: str = "read"
    special_tokens: str = "text"
    exif: str = "apply"

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size, _ in self.members)


class _Slices(dict[str, np.ndarray]):
    """Values that are found when they are first asked for."""

    def __init__(self, find: Callable[[str], np.ndarray]):
        super().__init__()
        self._find = find

    def __missing__(self, name: str) -> np.ndarray:
        self[name] = self._find(name)
        return self[name]


@dataclass(frozen=True)
class LeftOut:
    """Rows of a source that another row stands for, by reason; int64, ascending. Found for all sources of a run together."""

    mark: str  # changes with anything that decides about them
    find: Callable[[], Mapping[str, Mapping[str, np.ndarray]]]  # source -> reason -> rows


@dataclass
class SourceIndex:
    """A source's healthy samples, N rows. Made by `load_index`."""

    name: str
    folder: str
    shards: list[str]
    storage: Storage
    family: Family
    columns: Mapping[str, Any]  # index.columns.Column or int arrays [N], and flat list columns
    starts: Mapping[str, Any]  # list column group -> int64 [N + 1]
    ids: Any  # the text of each row, [N]
    kinds: list[str]
    kind_codes: Any  # int8 [N], into `kinds`
    suffixes: list[str]
    refused: dict[str, int] = field(default_factory=dict)  # reason -> samples that ingest or the index left out
    reading: dict[str, Any] = field(default_factory=dict)  # of `SampleLocation`: its settings of reading
    wanted: Wanted = field(default_factory=Wanted)
    place: Path = Path()  # the folder of the columns
    identity: str = ""  # changes with any row
    leaving: LeftOut | None = None  # what is left out for another row's sake
    _lengths: dict[Bounds, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.columns["shard"].shape[0])

    def part(self, first: int, stop: int) -> SourceIndex:
        """Rows [first, stop) as an index of its own, in memory; its row 0 is `first`. Columns are read when they are asked for."""

        def starts(group: str) -> np.ndarray:
            own = self.starts[group][first : stop + 1]
            return own - own[0]

        def column(name: str) -> np.ndarray:
            if name not in _GROUP_OF:
                return np.asarray(self.columns[name][first:stop])
            begin, end = (int(self.starts[_GROUP_OF[name]][row]) for row in (first, stop))
            return np.asarray(self.columns[name][begin:end])

        return self._small(column, starts)

    def only(self, rows: np.ndarray) -> SourceIndex:
        """These rows (int64, ascending) as an index of its own, in memory, whose row 0 is the first of them."""
        if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1:
            return self.part(int(rows[0]), int(rows[-1]) + 1)

        @cache
        def bounds(group: str) -> tuple[np.ndarray, np.ndarray]:
            begin = self.starts[group][rows]
            return begin, np.concatenate([[0], np.cumsum(self.starts[group][rows + 1] - begin)])

        def column(name: str) -> np.ndarray:
            if name not in _GROUP_OF:
                return np.asarray(self.columns[name][rows])
            begin, starts = bounds(_GROUP_OF[name])
            return np.asarray(self.columns[name][np.repeat(begin - starts[:-1], np.diff(starts)) + np.arange(int(starts[-1]))])

        return self._small(column, lambda group: bounds(group)[1])

    def _small(self, column: Callable[[str], np.ndarray], starts: Callable[[str], np.ndarray]) -> SourceIndex:
        return replace(self, columns=_Slices(column), starts=_Slices(starts), leaving=None, _lengths={})

    def parts(self) -> Iterator[tuple[int, SourceIndex]]:
        """(first row, its part) of stretch after stretch, through all rows."""
        for first in range(0, len(self), CHUNK):
            yield first, self.part(first, min(len(self), first + CHUNK))

    # ------------------------------------------------------------ which rows take part

    @cached_property
    def choice(self) -> Choice:
        """Which rows are held out and which train, by a seeded hash of what they hold: that does not move when samples are renamed
        or moved elsewhere. With a share each row's own hash decides, whatever rows are added."""
        hashes = lambda first, stop: self.part(first, stop).content_hash  # noqa: E731
        return make_choice(self.wanted, len(self), hashes, self.place / "choices" / self.wanted.mark, self.identity)

    @property
    def content_hash(self) -> np.ndarray:
        """uint64 [N]: of text and pictures."""
        return content_hashes(self.columns, self.starts["image"])

    @property
    def holdout_rows(self) -> np.ndarray:
        """int64, ascending: rows kept out of training."""
        return self.choice.holdout_rows[:]

    @property
    def train_rows(self) -> np.ndarray:
        """int64, ascending: rows that train. With `max_samples`, that many samples take part, the held-out ones among them.

        Without the rows that are left out: what is held out is not trained through another row or source.
        """
        return np.concatenate([np.zeros(0, np.int64), *(first + np.flatnonzero(part) for first, part in self.training())])

    def training(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, bool: which rows train) of stretch after stretch."""
        left_out = list(self._left_out.values())
        for first, trains in self._chosen():
            for rows in left_out:
                some = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(trains))]
                trains[some - first] = False
            yield first, trains

    def _chosen(self) -> Iterator[tuple[int, np.ndarray]]:
        for first, part in self.parts():
            yield first, self.choice.trains(first, part.content_hash)

    @cached_property
    def _left_out(self) -> Mapping[str, np.ndarray]:
        return self.leaving.find()[self.name] if self.leaving is not None else {}

    @cached_property
    def left_out(self) -> dict[str, int]:
        """Why -> rows that would train and do not."""
        counts = dict.fromkeys(self._left_out, 0)
        for first, trains in self._chosen() if any(map(len, self._left_out.values())) else ():
            for why, rows in self._left_out.items():
                some = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(trains))] - first
                counts[why] += int(trains[some].sum())
                trains[some] = False
        return {why: count for why, count in counts.items() if count}

    # ------------------------------------------------------------ lengths

    def lengths(self, pixels: Bounds) -> np.ndarray:
        """int32 [N]: tokens of each sample when its images are resized within `pixels`."""
        return self._measure(pixels)[0]

    def visual_tokens(self, pixels: Bounds) -> np.ndarray:
        """int32 [N]: image and video tokens of each sample (without the marks around them)."""
        return self._measure(pixels)[1]

    def pixel_rows(self, pixels: Bounds) -> np.ndarray:
        """int32 [N]: rows of pixels of each sample's images, frames of a pair counted once."""
        return self._measure(pixels)[2]

    @property
    def fixed_tokens(self) -> np.ndarray:
        """int32 [N]: tokens that no resolution changes, without the digits of coordinates."""
        return self.columns["fixed_tokens"]

    @property
    def supervised_tokens(self) -> np.ndarray:
        """int32 [N]: targets of each sample under `supervise: auto`, without the digits of coordinates beyond the first."""
        return self.columns["supervised_tokens"]

    def _measure(self, pixels: Bounds) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bounds = (int(pixels[0]), int(pixels[1]))
        if bounds not in self._lengths:
            if len(self) > CHUNK:
                measured = [part._measure(bounds) for _, part in self.parts()]
                self._lengths[bounds] = tuple(map(np.concatenate, zip(*measured)))  # type: ignore[assignment]
                return self._lengths[bounds]
            whole = self.part(0, len(self))
            columns, starts, family = whole.columns, whole.starts, self.family
            widths, heights = columns["width"], columns["height"]
            costs = _image_costs(family, widths, heights, bounds, np.diff(starts["image"]))
            pairs = family.frame_pairs(columns["visual_frames"])
            image = np.repeat(starts["image"][:-1], np.diff(starts["visual"])) + columns["visual_image"]
            visual, written = (_sums(of_image[image] * pairs, starts["visual"]) for of_image in (costs.tokens, costs.lengths))
            rows = _sums(costs.rows[image] * family.video_rows(columns["visual_frames"]), starts["visual"])
            owner = np.repeat(starts["image"][:-1], np.diff(starts["coordinate"])) + columns["coordinate_image"]
            numbers = family.coordinates(
                columns["coordinate_value"], columns["coordinate_axis"], widths[owner], heights[owner], costs[owner]
            )
            total = columns["fixed_tokens"] + written + _sums(family.coordinate_tokens(numbers), starts["coordinate"])
            self._lengths[bounds] = (total.astype(np.int32), visual.astype(np.int32), rows.astype(np.int32))
        return self._lengths[bounds]

    # ------------------------------------------------------------ one row

    def sizes(self, row: int) -> list[tuple[int, int]]:
        """(width, height) of each image of a sample."""
        part = self._part("image", row)
        return list(zip(self.columns["width"][part].tolist(), self.columns["height"][part].tolist()))

    def kind_of(self, row: int) -> str:
        return self.kinds[int(self.kind_codes[row])]

    def measure(self, row: int) -> Measure:
        """The sample's `Measure`, as `template.measure_sample` gave it."""
        columns = self.columns
        visual, coordinate, cut = self._part("visual", row), self._part("coordinate", row), self._part("cut", row)
        several = lambda part, *names: tuple(zip(*(columns[name][part].tolist() for name in names)))  # noqa: E731
        return Measure(
            int(columns["fixed_tokens"][row]),
            int(columns["supervised_tokens"][row]),
            several(visual, "visual_image", "visual_frames", "visual_place", "visual_coordinates"),
            several(coordinate, "coordinate_image", "coordinate_axis", "coordinate_value"),
            tuple(columns["cuts"][cut].tolist()),
            tuple(int(columns[name][row]) for name in _TARGET),
        )

    def location(self, row: int) -> SampleLocation:
        """Where the sample's bytes lie."""
        part, columns = self._part("member", row), self.columns
        suffixes = [self.suffixes[code] for code in columns["member_suffix"][part].tolist()]
        places = (columns[name][part].tolist() for name in ("member_offset", "member_size", "member_crc"))
        return SampleLocation(
            self.name, int(row), str(self.ids[row]), self.kind_of(row), self.shards[int(columns["shard"][row])],
            tuple(zip(suffixes, *places)), tuple(self.sizes(row)), self.storage, **self.reading,
        )  # fmt: skip

    def _part(self, group: str, row: int) -> slice:
        starts = self.starts[group]
        return slice(int(starts[row]), int(starts[row + 1]))


def load_index(
    folder: str,
    family: Family,
    storage: Storage = DEFAULT_STORAGE,
    *,
    seed: int = 0,
    holdout_samples: int = 0,
    holdout_share: float = 0.0,
    max_samples: int | None = None,
) -> SourceIndex:
    """Open the index that `build_index` left in `folder`. Raises InputError where there is none, or what is held out leaves nothing."""
    summary = load_summary(folder, storage)
    if summary is None:
        raise InputError(f"there is no finished index in {folder}; run `terrace index` first")
    stored = index_columns(folder, storage)
    columns = stored.columns
    index = SourceIndex(
        name=summary["source"],
        folder=folder,
        shards=[_shard_uri(folder, shard["uri"]) for shard in summary["shards"]],
        storage=Storage(**summary["storage"]),
        reading=_reading(summary),
        family=family,
        columns={name: columns[name] for name in (*SCALARS, *(name for names in LISTS.values() for name in names))},
        starts={group: columns[f"{STARTS}{group}"] for group in LISTS},
        ids=Strings(*(columns[name] for name in IDS)),
        kinds=stored.facts["kinds"],
        kind_codes=columns[KIND],
        suffixes=stored.facts["suffixes"],
        refused=summary["refused"],
        wanted=Wanted(seed, holdout_samples, holdout_share, max_samples),
        place=stored.folder,
        identity=stored.facts["identity"],
    )
    count = len(index)
    if index.choice.held_out >= (most := min(count, max_samples or count)):
        held = index.choice.held_out
        setting = f"holdout_share {holdout_share} ({held} samples)" if holdout_share else f"holdout_samples {holdout_samples}"
        raise InputError(f"source {summary['source']}: {setting} leaves none of {most} samples for training")
    return index


def locate(folder: str, row: int, storage: Storage = DEFAULT_STORAGE) -> SampleLocation:
    """Where one sample's bytes lie, from the index file of `folder` and without loading the index: a worker that must replace a sample

    reads one group of rows (those of one shard), a few hundred kilobytes.
    """
    summary = _summary(folder, storage.model_dump_json())
    with open_sequential(join(folder, "index.parquet"), storage) as stream:
        file = pq.ParquetFile(stream)
        group, first = 0, 0
        while row >= first + (count := file.metadata.row_group(group).num_rows):
            group, first = group + 1, first + count
        values = file.read_row_group(group, columns=_LOCATION_COLUMNS).slice(row - first, 1).to_pylist()[0]
    members = zip(*(values[name] for name in LISTS["member"]))
    return SampleLocation(
        summary["source"], row, values["id"], values["kind"],
        _shard_uri(folder, summary["shards"][values["shard"]]["uri"]),
        tuple(members), tuple(zip(values["width"], values["height"])), Storage(**summary["storage"]), **_reading(summary),
    )  # fmt: skip


def _reading(summary: dict[str, Any]) -> dict[str, Any]:
    reading = summary["reading"]
    return {**reading, "ignore": tuple(reading["ignore"])}


@lru_cache(maxsize=64)
def _summary(folder: str, storage_json: str) -> dict[str, Any]:
    summary = load_summary(folder, Storage.model_validate_json(storage_json))
    if summary is None:
        raise InputError(f"there is no finished index in {folder}; run `terrace index` first")
    return summary


_GROUP_OF = {name: group for group, names in LISTS.items() for name in names}
_TARGET = ("target_place", "target_visuals", "target_coordinates")
_LOCATION_COLUMNS = ["id", "kind", "shard", *LISTS["member"], "width", "height"]


def _shard_uri(folder: str, stored: str) -> str:
    """Shards that ingest wrote are named relative to the folder above the index."""
    return shard_uri(folder.rpartition("/")[0], stored)


def _image_costs(family: Family, widths: np.ndarray, heights: np.ndarray, pixels: Bounds, images: np.ndarray) -> Costs:
    """The costs of all images of samples that have so many `images` each, int64 [N]; a family may see one among several as another."""
    if family.among(2) is family:
        return family.costs(widths, heights, pixels)
    counts = np.repeat(images, images)
    parts = {int(count): np.flatnonzero(counts == count) for count in np.unique(counts)}
    costs = [family.among(count).costs(widths[part], heights[part], pixels) for count, part in parts.items()]
    back = np.argsort(np.concatenate([*parts.values(), np.zeros(0, np.int64)]).astype(np.int64))

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in costs] or [np.zeros(0, np.int64)])[back]

    inner = [one.lengths - one.tokens for one in costs] or [np.zeros(0, np.int64)]
    return Costs(*map(joined, ("tokens", "rows", "scale_heights", "scale_widths")), np.concatenate(inner)[back])


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each row's values, 0 for a row without any: int64 [N]."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return total[starts[1:]] - total[starts[:-1]]

