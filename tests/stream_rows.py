"""A small corpus and recipe for tests of the stream: captioned pictures and texts, twelve steps of four packs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from terrace.data.order.plan import StagePlan
from terrace.data.prepare import PreparedData, prepare_data
from terrace.data.types import PackedExample
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Recipe

TINY = Path(__file__).resolve().parent / "recipes" / "tiny.yaml"
STEPS = 12


def captioned_pictures(root: Path, count: int, longest_side: int, random: np.random.Generator) -> list[dict[str, str]]:
    """JPEGs of coarse noise in `root`, at least 40 pixels a side; their rows."""
    rows = []
    for number in range(count):
        width, height = (int(side) for side in random.integers(40, longest_side, 2))
        noise = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(root / f"{number}.jpg")
        words = " ".join(f"word{random.integers(30)}" for _ in range(random.integers(3, 30)))
        rows.append({"id": f"c{number}", "image": f"{number}.jpg", "text": words})
    return rows


def write_rows(root: Path) -> Path:
    """200 captioned pictures and 80 texts."""
    random = np.random.default_rng(0)
    captions = captioned_pictures(root, 200, 240, random)
    texts = [{"id": f"t{n}", "text": " ".join(f"line{random.integers(90)}" for _ in range(60))} for n in range(80)]
    for name, rows in (("captions", captions), ("text", texts)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    """The first stage of the tiny recipe over the rows; the others' sources do not exist here."""
    mixture = "stages.0.mixture={weights: {captions: 0.7, text: 0.3}}"
    sources = [f"data.sources.{name}.uri={folder / name}.jsonl" for name in ("captions", "text")]
    common = ["stages.0.sequence_length=256", "stages.0.pixels={min: 784, max: 25088}", "stages.0.batch.packs=4"]
    loading = ["stages.0.data_loading={packs_per_task: 3, window_samples: 50, prefetch_packs: 4}"]
    recipe = load_recipe(TINY, [mixture, *sources, *common, *loading, f"stages.0.budget={{steps: {STEPS}}}", *overrides])
    return recipe.model_copy(update={"stages": recipe.stages[:1]})


def open_all(folder: Path, run_dir: Path, *overrides: str) -> tuple[Recipe, PreparedData, StagePlan]:
    recipe = recipe_of(folder, *overrides)
    prepared = prepare_data(recipe, run_dir, use_ray=False)
    return recipe, prepared, StagePlan.build(recipe, 0, prepared)


def contents(packs: Iterable[PackedExample]) -> list[tuple[Any, ...]]:
    """Everything that a pack holds, to compare; its number first."""
    arrays = ("input_ids", "targets", "position_ids", "segment_ends", "pixels", "image_facts", "image_tokens", "image_rows")
    told = ("sample_ids", "sources", "kinds", "damaged", "replaced", "sequence_length")
    return [
        (pack.pack, *(getattr(pack, name).tobytes() for name in arrays), *(repr(getattr(pack, name)) for name in told))
        for pack in packs
    ]
