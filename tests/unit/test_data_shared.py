"""Real rows: every file of the shared folder through ingest and index, and every length as the template says."""

from __future__ import annotations

from pathlib import Path

import pytest

from terrace.data.prepare import PreparedData, load_prepared, prepare_data
from terrace.data.stream.read import read_located
from terrace.data.template import encode_prompt, encode_sample
from terrace.recipe.schema import Recipe

FEW = {"gui.jsonl": 104, "ocr.jsonl": 346, "text.jsonl": 500, "rl/visual_math.jsonl": 118}
ALL = FEW | {
    "captions.jsonl": 2071, "grounding.jsonl": 935, "interleaved.jsonl": 100, "qa.jsonl": 2382, "reasoning.jsonl": 2077,
    "preference.jsonl": 109, "rl/counting.jsonl": 627, "rl/grounding.jsonl": 365, "rl/gui.jsonl": 84, "rl/text_math.jsonl": 1000,
}  # fmt: skip


def prepared(shared_data: Path, files: dict[str, int], run_dir: Path) -> PreparedData:
    names = {file: file.removesuffix(".jsonl").replace("/", "-") for file in files}
    recipe = Recipe.model_validate(
        {
            "name": "shared",
            "model": {},
            "tokenizer": {"path": str(shared_data / "tokenizers" / "qwen2")},
            "data": {
                "sources": {
                    name: {
                        "uri": str(shared_data / file), "kind": "prompt" if file.startswith("rl/") else "qa",
                        "images_root": str(shared_data), "holdout_samples": 5,
                    }
                    for file, name in names.items()
                }
            },
            "stages": [
                {
                    "name": "s", "train": {"projector": {"lr": 0.001}}, "budget": {"steps": 1},
                    "mixture": {"weights": dict.fromkeys(names.values(), 1.0)},
                }
            ],
        }
    )  # fmt: skip
    result = prepare_data(recipe, run_dir)
    for file, name in names.items():
        assert len(result.indexes[name]) == files[file], name
        assert result.indexes[name].refused == {}, name
    assert prepare_data(recipe, run_dir).indexes.keys() == result.indexes.keys()
    return load_prepared(run_dir / "data")


def check_lengths(data: PreparedData, every: int) -> int:
    checked = 0
    for index in data.indexes.values():
        for pixels in ((3136, 1_003_520), (784, 50_176)):
            rows = range(0, len(index), every)
            lengths = index.lengths(pixels)
            for row, result in zip(rows, read_located([index.location(row) for row in rows])):
                sample, _ = result
                encode = encode_prompt if sample.messages[-1]["role"] == "user" else encode_sample
                assert len(encode(sample, index.sizes(row), data.tokenizer(), data.family, pixels).input_ids) == lengths[row], sample.id
                checked += 1
    return checked


def test_some_real_files(shared_data: Path, tmp_path: Path) -> None:
    assert check_lengths(prepared(shared_data, FEW, tmp_path), 5) > 400


@pytest.mark.slow
def test_every_real_file(shared_data: Path, tmp_path: Path) -> None:
    assert check_lengths(prepared(shared_data, ALL, tmp_path), 3) > 7_000
