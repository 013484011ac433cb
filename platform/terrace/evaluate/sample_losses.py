"""Loss on the held-out samples of prepared data: per sample the sum over its supervised tokens, and their number.

The samples are those that `holdout_samples` keeps out of training, whole, at the model's own resolution. A loss per token
compares only between models of one tokenizer, so another one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terrace.data.prepare import PreparedData, load_prepared
from terrace.data.stream.collate import CollateSettings, LoadedSample, collate
from terrace.data.stream.read import read_located
from terrace.data.types import PackSpec, Sample, SampleRef
from terrace.errors import DamagedData, InputError
from terrace.evaluate.cases import Case
from terrace.families.interface import Sight

if TYPE_CHECKING:
    from terrace.evaluate.engine import Model

MAX_SAMPLE_TOKENS = 16_384  # longer samples are left out; the same ones for every model of this tokenizer
MAX_IMAGE_PIXELS = 64_000_000


def held_out_cases(path: Path, sight: Sight, limit: int | None) -> list[Case]:
    """The held-out samples of every source, at most `limit` of each. `path`: a run's folder, or its `data` folder.

    Prompts of reinforcement learning have no answer, so there is no loss of them.
    """
    prepared, pixels = _prepared(path).read_by(sight.family.name), sight.pixels
    mark = [prepared.tokenizer().fingerprint, list(pixels)]
    cases = []
    for name, index in sorted(prepared.indexes.items()):
        lengths = index.lengths(pixels)
        rows = [int(row) for row in index.holdout_rows if lengths[row] <= MAX_SAMPLE_TOKENS and index.kind_of(row) != "prompt"]
        for row in rows[:limit]:
            location = index.location(row)
            members = [[suffix, size, crc] for suffix, _, size, crc in location.members]
            digest = hashlib.sha256(json.dumps([*mark, location.id, members]).encode()).hexdigest()
            kind = index.kind_of(row)
            metadata = {"category": kind, "source": name, "row": row}
            key = f"{name}/{location.id}"
            cases.append(Case(key, Sample(location.id, kind, []), (), (), "", metadata, key, 0, digest))
    if not cases:
        raise InputError(f"{path}: no source holds samples out of training; set data.sources.NAME.holdout_samples")
    return cases


def _prepared(path: Path) -> PreparedData:
    for folder in (path, path / "data"):
        if (folder / "prepared.json").is_file():
            return load_prepared(folder)
    raise InputError(f"{path}: no prepared.json in it or in its `data` folder; name the folder of a run (loss:RUN_DIR)")


def loss_measure(path: Path, model: Model) -> Callable[[Sequence[Case]], list[dict[str, float]]]:
    """A function from cases to `loss_sum` and `tokens` of each. Raises InputError if the model has another tokenizer."""
    prepared = _prepared(path).read_by(model.sight.family.name)
    if prepared.tokenizer().fingerprint != model.tokenizer.fingerprint:
        raise InputError(
            f"{path}: this data was indexed with another tokenizer than the model's; losses per token would not compare"
        )
    settings = CollateSettings(
        str(prepared.tokenizer_dir),
        model.sight.family,
        model.sight.pixels,
        MAX_SAMPLE_TOKENS,
        MAX_IMAGE_PIXELS,
        {},
        frozenset(),
    )
    return lambda cases: [_measured(case, prepared, settings, model) for case in cases]


def _measured(case: Case, prepared: PreparedData, settings: CollateSettings, model: Any) -> dict[str, float]:
    index, row = prepared.indexes[case.metadata["source"]], case.metadata["row"]
    location = index.location(row)
    [read] = read_located([location])
    if isinstance(read, DamagedData):
        raise read
    ref = SampleRef(index.name, row, location.id)
    length, visual = int(index.lengths(settings.pixels)[row]), int(index.visual_tokens(settings.pixels)[row])
    spec = PackSpec(0, (ref,), (length,), (visual,), int(index.pixel_rows(settings.pixels)[row]), 0)
    example = collate(spec, [LoadedSample(*read, location.sizes)], model.tokenizer, settings)
    return {"loss_sum": model.loss(example), "tokens": float(example.supervised_tokens)}
