"""One source's index in memory: numpy columns, and every length at any resolution as arithmetic on them.

About 150 bytes a sample with one image. Lists of a sample (images, coordinates, files) are flat arrays with start positions, so that
`lengths` of a million samples takes about a tenth of a second and reads no file.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from terrace.data.index.build import load_summary
from terrace.data.index.content import content_hashes
from terrace.data.sources.ingest import shard_uri
from terrace.data.template import Measure
from terrace.errors import InputError
from terrace.families.interface import Bounds, Costs, Family
from terrace.recipe.schema import Storage
from terrace.storage.files import join, open_sequential, read_file
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


@dataclass
class SourceIndex:
    """Columns of a source's healthy samples, N rows. Made by `load_index`."""

    name: str
    folder: str
    shards: list[str]
    storage: Storage
    family: Family
    columns: dict[str, np.ndarray]  # int columns [N], and flat list columns
    starts: dict[str, np.ndarray]  # list column group -> int64 [N + 1]
    ids: np.ndarray  # StringDType [N]
    kinds: list[str]
    kind_codes: np.ndarray  # int8 [N], into `kinds`
    suffixes: list[str]
    refused: dict[str, int] = field(default_factory=dict)  # reason -> samples that ingest or the index left out
    reading: dict[str, Any] = field(default_factory=dict)  # of `SampleLocation`: its settings of reading
    seed: int = 0
    holdout_samples: int = 0  # so many, or the share whose hashes lie lowest
    holdout_share: float = 0.0
    max_samples: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)  # why -> rows that would train and do not
    _left_out: np.ndarray | None = field(default=None, repr=False)
    _lengths: dict[Bounds, tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return int(self.columns["shard"].shape[0])

    # ------------------------------------------------------------ which rows take part

    @cached_property
    def _in_seeded_order(self) -> np.ndarray:
        """Rows by a seeded hash of what they hold: a choice that does not move when samples are renamed or moved elsewhere."""
        return np.argsort(_mixed(self.content_hash, self.seed), kind="stable")

    @cached_property
    def held_out(self) -> int:
        """How many of the first rows in that order are held out. With a share each row's own hash decides, whatever rows are added."""
        if not self.holdout_share:
            return self.holdout_samples
        return int((_mixed(self.content_hash, self.seed) < np.uint64(int(self.holdout_share * 2**64))).sum())

    @cached_property
    def content_hash(self) -> np.ndarray:
        """uint64 [N]: of text and pictures."""
        return content_hashes(self.columns, self.starts["image"])

    @property
    def holdout_rows(self) -> np.ndarray:
        """int64, ascending: rows kept out of training."""
        return np.sort(self._in_seeded_order[: self.held_out])

    @property
    def train_rows(self) -> np.ndarray:
        """int64, ascending: rows that train. With `max_samples`, that many samples take part, the held-out ones among them.

        Without the rows that `leave_out` named: what is held out is not trained through another row or source.
        """
        rows = np.sort(self._in_seeded_order[self.held_out : self.max_samples])
        return rows if self._left_out is None else rows[~self._left_out[rows]]

    def leave_out(self, why: str, rows: np.ndarray) -> None:
        """Take rows (bool [N]) out of training, and count those that would have trained."""
        count = int(rows[self.train_rows].sum())
        if count:
            self.left_out[why] = count
            self._left_out = rows if self._left_out is None else self._left_out | rows

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
            columns, starts, family = self.columns, self.starts, self.family
            widths, heights = columns["width"], columns["height"]
            costs = _image_costs(family, widths, heights, bounds, np.diff(starts["image"]))
            pairs = family.frame_pairs(columns["visual_frames"])
            image = np.repeat(starts["image"][:-1], np.diff(starts["visual"])) + columns["visual_image"]
            visual, rows, written = (
                _sums(of_image[image] * pairs, starts["visual"]) for of_image in (costs.tokens, costs.rows, costs.lengths)
            )
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
    """Load the index that `build_index` left in `folder`. Raises InputError where there is none, or what is held out leaves nothing."""
    summary = load_summary(folder, storage)
    if summary is None:
        raise InputError(f"there is no finished index in {folder}; run `terrace index` first")
    table = pq.read_table(io.BytesIO(read_file(join(folder, "index.parquet"), storage))).combine_chunks()
    count = table.num_rows
    scalar = ("id_hash", "shard", "fixed_tokens", "supervised_tokens", *_TARGET, "text_hash")
    columns = {name: _numpy(table[name]) for name in scalar}
    starts: dict[str, np.ndarray] = {}
    for group, names in _LISTS.items():
        for name in names:
            values, starts[group] = _flat(table[name])
            if name == "member_suffix":
                encoded = values.dictionary_encode()
                suffixes, columns[name] = encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)
            else:
                columns[name] = values.to_numpy(zero_copy_only=False)
    kinds = _one(table["kind"]).dictionary_encode()
    index = SourceIndex(
        name=summary["source"],
        folder=folder,
        shards=[_shard_uri(folder, shard["uri"]) for shard in summary["shards"]],
        storage=Storage(**summary["storage"]),
        reading=_reading(summary),
        family=family,
        columns=columns,
        starts=starts,
        ids=np.array(table["id"].to_pylist(), dtype=np.dtypes.StringDType()),
        kinds=kinds.dictionary.to_pylist(),
        kind_codes=kinds.indices.to_numpy(zero_copy_only=False).astype(np.int8),
        suffixes=suffixes,
        refused=summary["refused"],
        seed=seed,
        holdout_samples=holdout_samples,
        holdout_share=holdout_share,
        max_samples=max_samples,
    )
    if index.held_out >= (most := min(count, max_samples or count)):
        setting = f"holdout_share {holdout_share} ({index.held_out} samples)" if holdout_share else f"holdout_samples {holdout_samples}"
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
    members = zip(*(values[name] for name in _LISTS["member"]))
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


_TARGET = ("target_place", "target_visuals", "target_coordinates")
_LISTS = {
    "member": ("member_suffix", "member_offset", "member_size", "member_crc"),
    "image": ("width", "height", "image_hash"),
    "visual": ("visual_image", "visual_frames", "visual_place", "visual_coordinates"),
    "coordinate": ("coordinate_image", "coordinate_axis", "coordinate_value"),
    "cut": ("cuts",),
}
_LOCATION_COLUMNS = ["id", "kind", "shard", *_LISTS["member"], "width", "height"]


def _shard_uri(folder: str, stored: str) -> str:
    """Shards that ingest wrote are named relative to the folder above the index."""
    return shard_uri(folder.rpartition("/")[0], stored)


def _one(column: pa.ChunkedArray) -> Any:
    """The single array of a combined column (an empty one where the table has no rows)."""
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    return _one(column).to_numpy(zero_copy_only=False)


def _flat(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """(values, int64 [N + 1] start positions) of a list column."""
    array = _one(column)
    offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    return array.flatten(), offsets - offsets[0]


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


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """splitmix64 of hash and seed: uint64 [N]."""
    with np.errstate(over="ignore"):
        mixed = hashes.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
