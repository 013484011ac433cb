"""Which samples are the same: held-out pictures and texts are not trained through other rows or sources, repeats are counted or dropped."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_reading import words
from PIL import Image

from terrace.data.command import _overlaps
from terrace.data.prepare import PreparedData, prepare_data
from terrace.data.stream.read import read_sample
from terrace.recipe.schema import Recipe


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30 + number % 50, 40), (number * 7 % 256, number % 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def prepared(tmp_path: Path):
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "copy.png").write_bytes(picture(0))

    def preparing(rows: dict[str, list[dict[str, Any]]], holdout: dict[str, int], **data: Any) -> PreparedData:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        sources = {}
        for name, lines in rows.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in lines))
            sources[name] = {"uri": str(path), "kind": "document", "holdout_samples": holdout.get(name, 0)}
        stage = {
            "name": "sft", "train": {"language": {"lr": 1e-4}}, "mixture": dict.fromkeys(rows, 1.0), "sequence_length": 512,
            "pixels": {"min": 784, "max": 25_088}, "budget": {"steps": 1}, "batch": {"packs": 1},
        }  # fmt: skip
        recipe = {"name": "r", "model": {"config": {}}, "tokenizer": {"train_vocabulary_size": 340}, "stages": [stage],
                  "data": {"sources": sources, **data}}  # fmt: skip
        return prepare_data(Recipe.model_validate(recipe), folder, use_ray=False)

    return preparing


def said(prepared: PreparedData, name: str, rows: np.ndarray) -> list[str]:
    index = prepared.indexes[name]
    return [words(read_sample(index, int(row))[0]) for row in rows]


def test_held_out_content_is_not_trained_through_another_row_or_source(prepared) -> None:
    held = [{"image": f"{number}.png", "text": f"held {number}"} for number in range(20)]
    held += [{"text": f"only text {number}"} for number in range(20)]
    others = [{"image": f"{number}.png", "text": f"another text about {number}"} for number in range(20)]
    others += [{"image": "copy.png", "text": "a copy of the file"}, {"text": "only   text 3\n"}, {"image": "30.png", "text": "only text 4"},
               {"image": "31.png", "text": "held 5"}, {"text": "held 6"}, {"text": "something else"}]  # fmt: skip
    found = prepared({"a": held, "b": others}, {"a": 38})
    index = found.indexes["b"]
    kept_out = set(said(found, "a", found.indexes["a"].holdout_rows))
    assert len(kept_out) == 38
    texts, pictures = {line.partition(">")[2] or line for line in kept_out}, {line for line in kept_out if line.startswith("<0>")}
    trained = said(found, "b", index.train_rows)
    for number in range(20):
        line = f"<0>another text about {number}"
        assert (line in trained) == (f"<0>held {number}" not in pictures)
    assert ("<0>a copy of the file" in trained) == ("<0>held 0" not in pictures)
    assert ("only   text 3" in trained) == ("only text 3" not in texts)
    assert ("<0>only text 4" in trained) == ("only text 4" not in texts)
    assert ("held 6" in trained) == ("held 6" not in texts)
    assert {"<0>held 5", "something else"} <= set(trained)  # the same words about another picture are another sample
    assert index.left_out == {"held_out_elsewhere": len(index) - len(trained)}
    assert len(trained) < 8


def test_the_choice_does_not_move_when_rows_are_added_or_renamed(prepared) -> None:
    rows = [{"id": str(number), "text": f"text {number}"} for number in range(60)]
    before = prepared({"a": rows}, {"a": 10})
    chosen = set(said(before, "a", before.indexes["a"].holdout_rows))
    renamed = [{"id": f"new-{number}", "text": row["text"]} for number, row in enumerate(reversed(rows))]
    again = prepared({"a": renamed}, {"a": 10})
    assert set(said(again, "a", again.indexes["a"].holdout_rows)) == chosen
    added = [{"text": f"an added text {number}"} for number in range(12)]
    later = prepared({"a": [*added, *rows]}, {"a": 10})
    now = set(said(later, "a", later.indexes["a"].holdout_rows))
    assert {line for line in now if line.startswith("text")} <= chosen  # only added rows take a place
    assert len(now & chosen) >= 6


def test_repeats_are_counted_or_dropped(prepared) -> None:
    rows = [{"text": f"text {number}"} for number in range(10)]
    both = {"a": [*rows, {"text": "text 1"}], "b": [*rows[:4], {"text": "only here"}]}
    found = prepared(both, {})
    assert [len(index.train_rows) for index in found.indexes.values()] == [11, 5]
    dropped = prepared(both, {}, deduplicate="drop")
    assert [len(index.train_rows) for index in dropped.indexes.values()] == [10, 1]
    assert said(dropped, "b", dropped.indexes["b"].train_rows) == ["only here"]
    assert [index.left_out for index in dropped.indexes.values()] == [{"duplicate": 1}, {"duplicate": 4}]


def test_the_index_command_says_which_sources_overlap(prepared, tmp_path: Path) -> None:
    from terrace.recipe.schema_inputs import Data

    found = prepared({"a": [{"text": "one"}, {"text": "one"}, {"text": "two"}], "b": [{"text": "two"}, {"text": "three"}]}, {})
    folders = {name: index.folder for name, index in found.indexes.items()}
    lines = _overlaps(folders, found.family, Data(sources={"a": {"uri": "x"}}))
    assert [line.split(",")[0] for line in lines] == ["1 samples of a repeat others of it", "1 samples of b stand in a too"]
