"""Ingest and index as a Ray Data job: the same shards and the same index as in a plain loop."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terrace.data.index.build import build_index
from terrace.data.index.source_index import load_index
from terrace.data.sources import formats
from terrace.data.sources.ingest import ingest_source
from terrace.data.tokenizer import train_tokenizer
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.recipe.schema import Data, Source

FAMILY = Qwen25VL()


def _remember_share(told: list[int], what: str, done: int, total: int) -> None:
    told.append(100 * done // total)


@pytest.mark.ray
def test_units_on_ray_give_the_same_shards_and_index(ray_cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "UNIT_BYTES", 600)
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 255, (60, 40 + 10 * number, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "JPEG")
        (tmp_path / f"{number}.jpg").write_bytes(buffer.getvalue())
    rows = [{"id": f"r{n}", "image": f"{n % 5}.jpg", "text": "words " * 10} for n in range(40)]  # 4.jpg is not there
    for part in range(4):
        lines = [json.dumps(row) for row in rows[10 * part : 10 * part + 10]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    tokenizer = train_tokenizer(["words"], 320, tmp_path / "tokenizer", FAMILY)
    source = Source(uri=str(tmp_path / "*.jsonl"))
    data = Data(sources={"s": source}, shard_bytes=2**16)
    results = []
    for use_ray in (True, False):
        told: list[int] = []
        tell = partial(_remember_share, told)
        report = ingest_source("s", source, data, tmp_path / f"ray-{use_ray}", tell, use_ray)
        index = load_index(build_index("s", source, report, tokenizer, FAMILY, use_ray=use_ray), FAMILY)
        assert report.refused == {"missing_image": 8}
        assert told[-1] == 100
        shards = [Path(shard.uri).read_bytes() for shard in report.shards]
        results.append((shards, list(index.ids), index.lengths((3136, 50_176)).tolist()))
    assert results[0] == results[1]
    assert len(results[0][0]) == 4
    assert len(results[0][1]) == 32
