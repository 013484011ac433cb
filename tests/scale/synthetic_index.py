"""An index of any number of rows without its data: columns of drawn lengths where planning reads, holes in all others.

`write_prepared(folder, rows)` leaves what `prepare_data` would: a run's `data` folder, an index with its columns and the training items of
the recipe's stage, so that `load_prepared`, `plan_of` and everything behind them run unchanged. A sample is a picture and a text; its
lengths are drawn, and repeat every 2^20 rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from packs import ALL_PARTS, tiny_model

from terrace.data.family import family_of
from terrace.data.index import mapped
from terrace.data.index.build import SCHEMA
from terrace.data.index.choice import Wanted
from terrace.data.order.eligible import Fitting
from terrace.data.order.items import DTYPES as ITEM_DTYPES
from terrace.data.order.stored import items_folder
from terrace.data.prepare import PREPARED_VERSION, data_mark, load_prepared
from terrace.data.tokenizer import train_tokenizer
from terrace.families.registry import family_values
from terrace.recipe.schema import Recipe

DRAWN = 2**20
HELD_OUT = 100
SEQUENCE = 8_192
LISTS_PER_ROW = {"member": 2, "image": 1, "visual": 1, "coordinate": 0, "cut": 0}


def recipe_of(budget: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({
        "name": "synthetic", "model": tiny_model(), "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"s": {"uri": "nowhere", "holdout_samples": HELD_OUT}}},
        "stages": [{
            "name": "one", "train": ALL_PARTS, "mixture": {"weights": {"s": 1.0}}, "sequence_length": SEQUENCE, "budget": budget,
            "batch": {"packs": 512}, "precision": "fp32", "data_loading": {"engine": "inline"}, "pixels": {"min": 3_136, "max": 1_003_520},
        }],
    })  # fmt: skip


def write_prepared(root: Path, rows: int, recipe: Recipe) -> int:
    """The data folder of a run over `rows` rows. Returns the bytes that its columns take up on the disk."""
    family = family_of(recipe.model)
    tokenizer = train_tokenizer(iter(["some words to train on"] * 50), 300, root / "tokenizer", family)
    family = tokenizer.fit(family)
    folder = root / "s" / "index-x"
    folder.mkdir(parents=True)
    pq.write_table(SCHEMA.empty_table(), folder / "index.parquet")
    summary = {
        "version": 2, "source": "s", "kind": "caption", "samples": rows, "refused": {}, "shards": [{"uri": "a.tar", "size": 1}],
        "storage": recipe.data.storage.model_dump(),
        "reading": {"ignore": [], "placeholders": "read", "special_tokens": "text", "exif": "apply"},
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(summary))
    identity = mapped._identity(str(folder), recipe.data.storage)
    place = folder / ".columns"
    place.mkdir()
    _index_columns(place, rows, identity)
    wanted = Wanted(recipe.data.seed, HELD_OUT)
    held = np.linspace(0, rows - 1, HELD_OUT).astype(np.int64)
    choice = place / "choices" / wanted.mark
    _write(choice, {"holdout_rows": ("i8", held)}, {"identity": identity, "held_out": HELD_OUT, "start": [0, 0], "stop": None})
    manifest = {
        "version": PREPARED_VERSION, "mark": data_mark(recipe), "seed": recipe.data.seed, "tokenizer_dir": str(tokenizer.directory),
        "sources": {"s": {"folder": str(folder), "holdout_samples": HELD_OUT, "holdout_share": 0.0, "max_samples": None}},
        "storage": recipe.data.storage.model_dump(), "family": family_values(family), "deduplicate": recipe.data.deduplicate,
    }  # fmt: skip
    (root / "prepared.json").write_text(json.dumps(manifest))
    _items(load_prepared(root).indexes["s"], recipe, rows, held)
    return sum(path.stat().st_blocks * 512 for path in place.rglob("*.bin"))


def _index_columns(place: Path, rows: int, identity: str) -> None:
    columns: dict[str, Any] = {}
    for name, dtype in mapped.DTYPES.items():
        group = next((group for group, names in mapped.LISTS.items() if name in names), None)
        count = rows * LISTS_PER_ROW[group] if group else rows * 10 if name == mapped.IDS[0] else rows
        columns[name] = {"dtype": np.dtype(dtype).str, "count": count, "stored": np.dtype(dtype).str}
        if name in mapped.IDS[1] or name.startswith(mapped.STARTS):
            step = 10 if name == mapped.IDS[1] else LISTS_PER_ROW[name.removeprefix(mapped.STARTS)]
            columns[name] = {"dtype": "<i8", "count": rows + 1, "first": 0, "step": step}
            continue
        with open(place / f"{name}.bin", "wb") as file:
            file.truncate(count * np.dtype(dtype).itemsize)
    facts = {"identity": identity, "rows": rows, "suffixes": [".jpg", ".txt"], "kinds": ["caption"]}
    (place / "columns.json").write_text(json.dumps({"format": 1, "facts": facts, "columns": columns}))


def _items(index: Any, recipe: Recipe, rows: int, held: np.ndarray) -> None:
    """Where `stored_source` looks for them: lengths of 60 to 1,400 tokens, most of them pictures."""
    stage, count = recipe.stages[0], rows - len(held)
    fitting = Fitting((stage.pixels.min, stage.pixels.max), SEQUENCE, stage.data_loading.max_visual_tokens_per_pack, True)
    folder, identity = items_folder(recipe.data.sources["s"], index, fitting, ["all"])
    rng = np.random.default_rng(0)
    visual = rng.integers(16, 1_280, DRAWN).astype(np.uint16)
    drawn = {"lengths": visual + rng.integers(40, 120, DRAWN).astype(np.uint16), "visual_tokens": visual, "pixel_rows": visual * 4}
    folder.mkdir(parents=True)
    columns: dict[str, Any] = {}
    for name, dtype in ITEM_DTYPES.items():
        columns[name] = {"dtype": np.dtype(dtype).str, "count": count, "first": -1 if name == "stops" else 0, "step": 0}
        if name in drawn:
            columns[name] = {"dtype": "<i4", "count": count, "stored": "<u2"}
            with open(folder / f"{name}.bin", "wb") as file:
                for start in range(0, count, DRAWN):
                    drawn[name][: count - start].tofile(file)
    del columns["rows"]
    _write(folder, {"passed_over": ("i8", held - np.arange(len(held)))}, {})
    written = json.loads((folder / "columns.json").read_text())["columns"]
    tokens = int(drawn["lengths"].sum()) * (count // DRAWN) + int(drawn["lengths"][: count % DRAWN].sum())
    facts = {"identity": identity, "count": count, "tokens": tokens, "mark": "synthetic", "placed": "synthetic", "changes": {}}
    (folder / "columns.json").write_text(json.dumps({"format": 1, "facts": facts, "columns": columns | written}))


def _write(folder: Path, values: dict[str, tuple[str, np.ndarray]], facts: dict[str, Any]) -> None:
    from terrace.data.index.columns import ColumnsWriter

    folder.mkdir(parents=True, exist_ok=True)
    writer = ColumnsWriter(folder, {name: dtype for name, (dtype, _) in values.items()})
    writer.append(**{name: some for name, (_, some) in values.items()})
    writer.finish(facts)
