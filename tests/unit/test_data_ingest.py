"""Ingest and index on small folders: damaged input by name, restarts, every sample back byte for byte."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from terrace.data.index.build import build_index
from terrace.data.index.source_index import load_index
from terrace.data.sources.ingest import ingest_source, iter_refused, load_report
from terrace.data.sources.refusals import REASONS
from terrace.data.stream.read import read_located, read_sample
from terrace.data.template import encode_prompt, encode_sample
from terrace.data.tokenizer import train_tokenizer
from terrace.errors import DamagedData, InputError
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.recipe.schema import Data, Source
from terrace.storage.s3 import DEFAULT_STORAGE

FAMILY = Qwen25VL()

PIXELS = (3136, 200_704)


def picture(width: int, height: int, kind: str = "JPEG", seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((width, height)).save(buffer, kind)
    return buffer.getvalue()


def write_rows(path: Path, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def data_of(path: Path, **fields) -> Data:
    fields = {"kind": "document", **fields}  # rows with and without pictures
    sizes = {key: fields.pop(key) for key in ("shard_bytes", "max_image_pixels") if key in fields}
    return Data(sources={"s": Source(uri=str(path), **fields)}, **sizes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(["the cat sits on the mat", "count the boxes"] * 4, 340, tmp_path_factory.mktemp("tokenizer"), FAMILY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve healthy caption rows over five images."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(picture(60 + 40 * number, 90, seed=number))
    rows = [{"id": f"c{n}", "image": f"images/{n % 5}.jpg", "text": f"caption {n}\u2028still one line"} for n in range(12)]
    write_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path


def test_damaged_input_is_refused_by_name_and_the_rest_goes_through(folder: Path, tokenizer) -> None:
    images = folder / "images"
    (images / "cut.jpg").write_bytes(picture(200, 200)[:2000])
    (images / "cut.png").write_bytes(picture(200, 200, "PNG")[:2000])
    (images / "text.jpg").write_text("this is no image")
    bomb = picture(8, 8)
    place = bomb.index(b"\xff\xc0")
    (images / "bomb.jpg").write_bytes(bomb[: place + 5] + (10_000).to_bytes(2) * 2 + bomb[place + 9 :])
    (images / "thin.png").write_bytes(picture(900, 2, "PNG"))
    (folder.parent / "outside.jpg").write_bytes(picture(50, 50))
    good = {"image": "images/0.jpg", "text": "fine"}
    turns = [{"role": "user", "content": "<image><image>Q"}, {"role": "assistant", "content": "A"}]
    bad = {
        "truncated_image": [{**good, "image": "images/cut.jpg"}, {**good, "image": "images/cut.png"}],
        "not_an_image": [{**good, "image": "images/text.jpg"}],
        "missing_image": [{**good, "image": "images/none.jpg"}, {**good, "image": "images"}],
        "image_too_large": [{**good, "image": "images/bomb.jpg"}],
        "image_aspect_ratio": [{**good, "image": "images/thin.png"}],
        "unsafe_path": [
            {**good, "image": "../outside.jpg"}, {**good, "image": "images/../images/0.jpg"}, {**good, "image": "/etc/passwd"},
            {**good, "image": str(folder.parent / "outside.jpg")}, {**good, "image": "a\\..\\b.jpg"},
        ],
        "placeholder_mismatch": [{"messages": turns, "images": ["images/0.jpg"]}],
        "empty_answer": [{"id": "silent", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]}],
        "empty_text": [{**good, "text": ""}],
        "duplicate_id": [{"id": "c3", "image": "images/3.jpg", "text": "caption 3\u2028still one line"}],
        "bad_row": ["{not json", '"text"', {**good, "text": "\ud800"}],
    }  # fmt: skip
    bad["bad_row"][2] = json.dumps(bad["bad_row"][2])
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
    absolute = {**good, "image": str(images / "0.jpg")}
    write_rows(folder / "rows.jsonl", [*rows, *(row for group in bad.values() for row in group), absolute])
    data = data_of(folder / "rows.jsonl")
    report = ingest_source("s", data.sources["s"], data, folder / "out")
    assert report.refused == {reason: len(group) for reason, group in bad.items()}
    assert report.samples == 13
    lines = list(iter_refused(report.folder, DEFAULT_STORAGE))
    assert lines[0].origin == "rows.jsonl:13"
    assert [line.id for line in lines if line.reason in ("empty_answer", "missing_image")][-1] == "silent"
    assert all(line.reason in REASONS and line.detail for line in lines)
    index = load_index(build_index("s", data.sources["s"], report, tokenizer, FAMILY), FAMILY)
    assert len(index) == 13
    assert index.refused == report.refused


def test_a_source_without_a_healthy_sample_is_an_input_error(folder: Path) -> None:
    write_rows(folder / "rows.jsonl", [{"image": "nowhere.jpg", "text": "t"}] * 3)
    data = data_of(folder / "rows.jsonl")
    for _ in range(2):  # also when the answer is already on disk
        with pytest.raises(InputError, match="3 missing_image"):
            ingest_source("s", data.sources["s"], data, folder / "out")
    with pytest.raises(InputError, match="there is no file"):
        ingest_source("s", Source(uri=str(folder / "absent")), data, folder / "out")


def test_every_sample_comes_back_and_its_length_is_known(folder: Path, tokenizer) -> None:
    turns = [{"role": "user", "content": "<image><image>Where?"}, {"role": "assistant", "content": "<bbox> or <point>"}]
    objects = {"bbox": [[3, 4, 99.5, 88]], "point": [[7, 9]]}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
    rows += [
        {"id": "two", "messages": turns, "images": ["images/4.jpg", "images/1.jpg"], "objects": objects},
        {"id": "rl", "messages": turns[:1], "images": ["images/2.jpg", "images/1.jpg"], "solution": "3"},
        {
            "id": "film",
            "messages": [
                {"role": "user", "content": [{"type": "video", "video": ["images/1.jpg"] * 3, "fps": 1}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "Nothing moves."},
            ],
        },
        {"id": "words", "text": "only words\nand more <|im_end|>"},
    ]
    write_rows(folder / "rows.jsonl", rows)
    data = data_of(folder / "rows.jsonl", shard_bytes=2**16)
    report = ingest_source("s", data.sources["s"], data, folder / "out")
    index = load_index(build_index("s", data.sources["s"], report, tokenizer, FAMILY), FAMILY)
    assert [str(name) for name in index.ids] == [row["id"] for row in rows]
    for pixels in ((3136, 200_704), (784, 4_000), (100_000, 10_000_000)):
        lengths, visual, patches = index.lengths(pixels), index.visual_tokens(pixels), index.pixel_rows(pixels)
        for row in range(len(index)):
            sample, files = read_sample(index, row)
            encode = encode_prompt if sample.id == "rl" else encode_sample
            encoded = encode(sample, index.sizes(row), tokenizer, FAMILY, pixels)
            assert len(encoded.input_ids) == lengths[row] == index.measure(row).length(index.sizes(row), pixels, FAMILY)
            assert sum(int(facts.prod()) for facts in encoded.facts) == patches[row] == 4 * visual[row]
            assert [Image.open(io.BytesIO(file)).size for file in files] == index.sizes(row)
    assert read_sample(index, 0)[1] == [(folder / "images" / "0.jpg").read_bytes()]
    assert "\u2028" in read_sample(index, 0)[0].messages[0]["content"][1]["text"]


def test_unchanged_input_is_not_read_again_and_changed_input_is(folder: Path, tokenizer) -> None:
    data = data_of(folder / "rows.jsonl")
    first = ingest_source("s", data.sources["s"], data, folder / "out")
    shards = {shard.uri: Path(shard.uri).read_bytes() for shard in first.shards}
    again = ingest_source("s", data.sources["s"], data, folder / "out")
    assert again.reused
    assert again.shards == first.shards
    (Path(first.folder) / "ingest.json").unlink()  # killed before the end: the unit's receipt is used
    for uri in shards:
        Path(uri).unlink()
    resumed = ingest_source("s", data.sources["s"], data, folder / "out")
    assert not resumed.reused
    assert resumed.samples == 12
    assert not Path(first.shards[0].uri).exists()  # nothing was done twice
    elsewhere = ingest_source("s", data.sources["s"], data, folder / "other")
    assert [Path(shard.uri).read_bytes() for shard in elsewhere.shards] == list(shards.values())  # the same bytes
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"text": "new"}\n')
    changed = ingest_source("s", data.sources["s"], data, folder / "out")
    assert changed.folder != first.folder
    assert changed.samples == 13
    assert load_report(first.folder, DEFAULT_STORAGE) is not None


def test_the_index_goes_on_after_a_kill(folder: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from terrace.data.index import build as module

    rows = [{"id": str(n), "image": f"images/{n % 5}.jpg", "text": "word " * 20} for n in range(60)]
    write_rows(folder / "rows.jsonl", rows)
    data = data_of(folder / "rows.jsonl", shard_bytes=2**16)
    report = ingest_source("s", data.sources["s"], data, folder / "out")
    assert len(report.shards) > 2
    real, opened = module.scan_shard, []

    def failing(uri: str, storage):
        opened.append(uri)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return real(uri, storage)

    monkeypatch.setattr(module, "scan_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        build_index("s", data.sources["s"], report, tokenizer, FAMILY)
    index = load_index(build_index("s", data.sources["s"], report, tokenizer, FAMILY), FAMILY)
    assert len(opened) == len(report.shards) + 1  # only the interrupted shard was opened twice
    assert sorted(int(name) for name in index.ids) == list(range(60))


def test_held_out_and_capped_rows(folder: Path, tokenizer) -> None:
    data = data_of(folder / "rows.jsonl")
    report = ingest_source("s", data.sources["s"], data, folder / "out")
    where = build_index("s", data.sources["s"], report, tokenizer, FAMILY)
    index = load_index(where, FAMILY, seed=1, holdout_samples=3, max_samples=8)
    assert len(index.holdout_rows) == 3
    assert len(index.train_rows) == 5
    assert not set(index.holdout_rows) & set(index.train_rows)
    assert set(load_index(where, FAMILY, seed=1, holdout_samples=3).holdout_rows) == set(index.holdout_rows)
    share = load_index(where, FAMILY, holdout_share=0.3)
    assert 0 < len(share.holdout_rows) < 8
    assert not set(share.holdout_rows) & set(share.train_rows)
    choices = {tuple(load_index(where, FAMILY, seed=seed, holdout_samples=3).holdout_rows) for seed in range(8)}
    assert len(choices) > 3
    with pytest.raises(InputError, match="holdout_samples 12"):
        load_index(where, FAMILY, holdout_samples=12)


def test_bytes_that_changed_after_indexing_are_named(folder: Path, tokenizer) -> None:
    data = data_of(folder / "rows.jsonl")
    report = ingest_source("s", data.sources["s"], data, folder / "out")
    index = load_index(build_index("s", data.sources["s"], report, tokenizer, FAMILY), FAMILY)
    shard = Path(report.shards[0].uri)
    content = bytearray(shard.read_bytes())
    _, offset, size, _ = index.location(4).members[1]
    content[offset + size // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedData, match=r"sample c4, shard .*checksum"):
        read_sample(index, 4)
    results = read_located([index.location(row) for row in range(12)])
    assert [isinstance(result, DamagedData) for result in results] == [row == 4 for row in range(12)]
    shard.write_bytes(content[: index.location(6).members[0][1] + 10])
    results = read_located([index.location(row) for row in range(12)])
    assert [isinstance(result, DamagedData) for result in results] == [row == 4 or row >= 6 for row in range(12)]
    assert "the shard was cut" in str(results[6])
    shard.unlink()
    assert "the shard is gone" in str(read_located([index.location(0)])[0])


def test_one_id_for_several_samples_keeps_them_all_and_a_true_repeat_once(folder: Path, tokenizer) -> None:
    again = {"id": "c3", "image": "images/3.jpg", "text": "caption 3\u2028still one line"}
    others = [{"id": "c3", "text": "other"}, {"id": "c3", "text": "another"}, {"id": "c99", "text": "new"}, again]
    write_rows(folder / "zz.jsonl", others)
    data = data_of(folder, format="jsonl")
    report = ingest_source("s", data.sources["s"], data, folder / "out")
    assert report.renamed == 2  # within zz.jsonl
    index = load_index(build_index("s", data.sources["s"], report, tokenizer, FAMILY), FAMILY)
    assert index.refused == {"duplicate_id": 1}
    names = list(map(str, index.ids))
    assert len(set(names)) == len(names) == 15
    texts = [read_sample(index, row)[0].messages[0]["content"][-1]["text"] for row, name in enumerate(names) if name.startswith("c3")]
    assert sorted(texts) == ["another", "caption 3\u2028still one line", "other"]
    assert all(read_sample(index, row)[0].id == name for row, name in enumerate(names))


def test_shards_are_plain_webdataset(folder: Path) -> None:
    data = data_of(folder / "rows.jsonl")
    report = ingest_source("s", data.sources["s"], data, folder / "out")
    with tarfile.open(report.shards[0].uri) as tar:
        names = tar.getnames()
    assert names[:2] == ["c0.json", "c0.0.jpg"]
    assert Path(report.shards[0].uri).name == "s-000000-000.tar"
