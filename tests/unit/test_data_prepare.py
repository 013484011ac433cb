"""`prepared.json`, the pin of a run's data: found again, and refused with a way out when it is not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from terrace.data.prepare import load_prepared, prepare_data
from terrace.errors import InputError
from terrace.recipe.schema import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"text number {n}"}) + "\n" for n in range(9)))
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"config": {}},
            "tokenizer": {"train_vocabulary_size": 320},
            "data": {"sources": {"text": {"uri": str(tmp_path / "rows.jsonl"), "kind": "text"}}},
            "stages": [
                {"name": "one", "train": {"projector": {"lr": 1e-3}}, "mixture": {"weights": {"text": 1.0}}, "budget": {"steps": 1}}
            ],
        }
    )


def test_an_incomplete_pin_is_refused_by_name(recipe: Recipe, tmp_path: Path) -> None:
    root = prepare_data(recipe, tmp_path / "run", use_ray=False).root
    file = root / "prepared.json"
    whole = json.loads(file.read_text())
    assert len(load_prepared(root).indexes["text"]) == 9
    for key in whole:
        if key not in ("version", "mark"):
            file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
            with pytest.raises(InputError, match=rf"prepared.json lacks '{key}'; restore the file, or delete it"):
                load_prepared(root)
    source = whole["sources"]["text"]
    for value, told in [
        (whole | {"sources": {"text": {"folder": source["folder"]}}}, "lacks 'holdout_samples'"),
        (whole | {"sources": [1]}, "cannot be understood"),
        (whole | {"storage": {"frog": 1}}, "cannot be understood"),
        ([whole], "is no JSON object"),
    ]:
        file.write_text(json.dumps(value))
        with pytest.raises(InputError, match=told):
            load_prepared(root)
    file.write_text(json.dumps(whole)[:-20])
    with pytest.raises(InputError, match="is no JSON"):
        load_prepared(root)
    with pytest.raises(InputError, match="is no JSON"):  # nor are other samples prepared in its place
        prepare_data(recipe, tmp_path / "run", use_ray=False)
    file.unlink()
    assert len(prepare_data(recipe, tmp_path / "run", use_ray=False).indexes["text"]) == 9
    with pytest.raises(InputError, match="no prepared data"):
        load_prepared(tmp_path)
