"""Which samples are the same: held-out pictures and texts are not trained through other rows or sources, repeats are counted or dropped."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_reading import words
from PIL import Image

from terrace.cli import main
from terrace.data.command import _overlaps
from terrace.data.look.near import near_ones
from terrace.data.prepare import PreparedData, prepare_data
from terrace.data.stream.read import read_sample
from terrace.errors import InputError
from terrace.evaluate.duplicates_command import compare
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

    def preparing(rows: dict[str, list[dict[str, Any]]], holdout: dict[str, float], **data: Any) -> PreparedData:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        sources = {}
        for name, lines in rows.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in lines))
            held = holdout.get(name, 0)
            sources[name] = {"uri": str(path), "kind": "document", "holdout_share" if 0 < held < 1 else "holdout_samples": held}
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


def test_with_a_share_every_held_out_row_stays_so_and_none_that_trained_becomes_one(prepared) -> None:
    rows = [{"text": f"text {number}"} for number in range(60)]
    before = prepared({"a": rows}, {"a": 0.2})
    chosen = set(said(before, "a", before.indexes["a"].holdout_rows))
    assert 4 <= len(chosen) <= 20
    known = chosen
    for added in (7, 40, 90, 200):  # not one growth: the lowest share of all rows would sometimes be these, too
        later = prepared({"a": [*({"text": f"an added text {number}"} for number in range(added)), *rows]}, {"a": 0.2})
        now = set(said(later, "a", later.indexes["a"].holdout_rows))
        assert {line for line in now if line.startswith("text")} == chosen
        assert known <= now, "what was added and held out stays so as well"
        trained = set(said(later, "a", later.indexes["a"].train_rows))
        assert len(trained) == 60 + added - len(now)
        assert not trained & now
        known = now
    assert known != chosen
    with pytest.raises(InputError, match=r"holdout_share 0.999 \(60 samples\) leaves none of 60 samples for training"):
        prepared({"a": rows}, {"a": 0.999})


def test_repeats_are_counted_or_dropped(prepared) -> None:
    rows = [{"text": f"text {number}"} for number in range(10)]
    both = {"a": [*rows, {"text": "text 1"}], "b": [*rows[:4], {"text": "only here"}]}
    found = prepared(both, {})
    assert [len(index.train_rows) for index in found.indexes.values()] == [11, 5]
    dropped = prepared(both, {}, deduplicate="drop")
    assert [len(index.train_rows) for index in dropped.indexes.values()] == [10, 1]
    assert said(dropped, "b", dropped.indexes["b"].train_rows) == ["only here"]
    assert [index.left_out for index in dropped.indexes.values()] == [{"duplicate": 1}, {"duplicate": 4}]


def drawn(seed: int, size: tuple[int, int] = (120, 90), kind: str = "PNG", **options: Any) -> bytes:
    """A smooth random picture."""
    values = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_that_look_the_same_are_found_between_sources_and_suites(prepared, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"p{number}.png").write_bytes(drawn(number))
    (tmp_path / "small.jpg").write_bytes(drawn(0, (64, 48), "JPEG", quality=70))
    (tmp_path / "webp.webp").write_bytes(drawn(1, (300, 225), "WEBP", quality=60))
    (tmp_path / "flat.png").write_bytes(picture(0))
    one = [{"image": f"p{number}.png", "text": f"one {number}"} for number in range(4)] + [{"image": "flat.png", "text": "flat"}]
    two = [{"image": "small.jpg", "text": "a"}, {"image": "webp.webp", "text": "b"}, {"image": "p5.png", "text": "c"},
           {"image": "copy.png", "text": "flat too"}, {"image": "p3.png", "text": "one 3"}]  # fmt: skip
    found = prepared({"one": one, "two": two}, {})
    suites = {"caption:cases": [drawn(4, (200, 150), "JPEG", quality=80), drawn(2, (160, 120), "JPEG", quality=80)]}
    assert compare(found.indexes, suites) == [
        {"one": "one", "other": "two", "suite": False, "same_samples": 1, "near_pictures": 3},
        {"one": "one", "other": "caption:cases", "suite": True, "same_samples": 0, "near_pictures": 1},
    ]  # fmt: skip


def test_near_prints_are_those_within_three_bits() -> None:
    random = np.random.default_rng(0)
    prints = np.unique(random.integers(0, 2**63, 300, np.uint64))
    others = np.concatenate([prints[:40] ^ np.uint64(0b1011), prints[40:60] ^ np.uint64(0xF), random.integers(0, 2**63, 200, np.uint64)])
    by_hand = sum(any(int(other ^ own).bit_count() <= 3 for own in prints) for other in others)
    assert near_ones(prints, others) == by_hand == 40


def test_the_index_command_says_which_sources_overlap(prepared, tmp_path: Path) -> None:
    from terrace.recipe.schema_inputs import Data

    found = prepared({"a": [{"text": "one"}, {"text": "one"}, {"text": "two"}], "b": [{"text": "two"}, {"text": "three"}]}, {})
    folders = {name: index.folder for name, index in found.indexes.items()}
    lines = _overlaps(folders, found.family, Data(sources={"a": {"uri": "x"}}))
    assert [line.split(",")[0] for line in lines] == ["1 samples of a repeat others of it", "1 samples of b stand in a too"]


def test_the_duplicates_command(prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        (tmp_path / f"p{number}.png").write_bytes(drawn(number))
    (tmp_path / "small.jpg").write_bytes(drawn(0, (64, 48), "JPEG", quality=70))
    files = {"one": [{"image": f"p{number}.png", "text": str(number)} for number in range(3)], "two": [{"image": "small.jpg", "text": "x"}],
             "suite": [{"image": "p2.png", "text": "asked"}, {"image": "p3.png", "text": "else"}]}  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "tiny.yaml").read_text())
    sources = {name: {"uri": str(tmp_path / f"{name}.jsonl"), "kind": "caption"} for name in ("one", "two")}
    stage = {**base["stages"][0], "mixture": dict.fromkeys(sources, 1.0), "evaluate": {"suites": [f"caption:{tmp_path / 'suite.jsonl'}"]}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**base, "data": {"sources": sources}, "stages": [stage]}))
    assert main(["duplicates", str(tmp_path / "r.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told == ["one and two: 1 pictures look the same", f"one and suite caption:{tmp_path / 'suite.jsonl'}: 1 pictures look the same"]
    again = ["ingest", str(tmp_path / "r.yaml"), "--duplicates", "--out", str(tmp_path / "out")]
    assert main(again) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == told
    for more, said in (["--source", "one"], "leave --source out"), (["--uri", "x"], "either a recipe file or --uri"):
        assert main([*again, *more]) == 2
        assert said in capsys.readouterr().err
