"""The training items of a stage's source on disk, beside the columns of its index: made by whoever comes first, opened by all others.

What they depend on (index, choice of rows, resolution, length, the source's settings) names their folder, so stages and runs that
agree in it share them, and a resume opens them at once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.index.columns import CHUNK
from terrace.data.order.eligible import Fitting, eligible_items
from terrace.data.order.items import EligibleSource, Items, StoredItems, store_items
from terrace.families.registry import family_values
from terrace.recipe.schema import Source

ITEMS_VERSION = 1


def stored_source(
    name: str, source: Source, index: Any, wanted: Fitting, one_picture: bool = False, held_out: bool = False
) -> EligibleSource:
    """The items of a SourceIndex's rows that train (or that are held out) at the stage's resolution.

    `one_picture`: of samples that show exactly one picture; the others are counted.
    """
    changes: Counter[str] = Counter()

    def pieces() -> Iterator[Items]:
        if held_out:
            rows = index.holdout_rows
            stretches = (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))
        else:
            stretches = (first + np.flatnonzero(trains) for first, trains in index.training())
        yield from eligible_items(source, index, stretches, wanted, changes)
        if not held_out:
            changes.update(index.left_out)

    items = _stored(source, index, wanted, pieces, changes, ["held out" if held_out else "all"])
    mark = items.facts["mark"]
    if one_picture:
        items = _of_one_picture(source, index, wanted, items, "held out, one picture" if held_out else "one picture")
    return EligibleSource(name, items, lambda row: str(index.ids[row]), dict(items.facts["changes"]), mark)


def _of_one_picture(source: Source, index: Any, wanted: Fitting, items: StoredItems, what: str) -> StoredItems:
    changes: Counter[str] = Counter(items.facts["changes"])

    def pieces() -> Iterator[Items]:
        starts = index.starts["image"]
        for start in range(0, len(items), CHUNK):
            some = items[start : start + CHUNK]
            single = starts[some.rows + 1] - starts[some.rows] == 1
            changes["not_one_picture"] += int((~single).sum())
            yield some[single]

    return _stored(source, index, wanted, pieces, changes, [what])


def items_folder(source: Source, index: Any, wanted: Fitting, what: list[str]) -> tuple[Path, str]:
    """Where the items lie, and what says that they are still of this index."""
    settings = source.model_dump(mode="json", include={"too_long", "supervise", "max_visual_tokens_per_image", "on_damage"})
    values = [
        ITEMS_VERSION, index.wanted.mark, index.leaving.mark if index.leaving else None, settings, wanted.pixels, wanted.sequence_length,
        wanted.max_visual_tokens_per_pack, wanted.needs_targets, family_values(index.family), *what,
    ]  # fmt: skip
    mark = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return index.place / "items" / mark[:32], f"{index.identity} {mark}"


def _stored(
    source: Source, index: Any, wanted: Fitting, pieces: Callable[[], Iterator[Items]], changes: Counter[str], what: list[str]
) -> StoredItems:
    def id_hashes() -> Iterator[np.ndarray]:
        column = index.columns["id_hash"] if what == ["all"] else ()  # only of these items somebody asks for their mark
        return (column[start : start + CHUNK] for start in range(0, len(column), CHUNK))

    folder, identity = items_folder(source, index, wanted, what)
    return store_items(folder, identity, pieces, len(index), id_hashes, changes, source.on_damage == "skip")
