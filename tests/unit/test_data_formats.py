"""The formats in which people keep image-text data, through ingest, index and back."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from terrace.data.index.build import build_index
from terrace.data.index.source_index import SourceIndex, load_index
from terrace.data.sources import formats, unpack
from terrace.data.sources.ingest import ingest_source
from terrace.data.sources.listing import Listing, list_source
from terrace.data.sources.planning import plan_units
from terrace.data.sources.readers import read_rows
from terrace.data.stream.read import read_sample
from terrace.data.tokenizer import train_tokenizer
from terrace.errors import InputError
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.recipe.schema import Data, Source
from terrace.storage.files import list_files
from terrace.storage.s3 import DEFAULT_STORAGE

FAMILY = Qwen25VL()

TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]


def picture(seed: int, kind: str = "JPEG", side: int = 48) -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (side, side + 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(["a cat", "two cats"] * 4, 320, tmp_path_factory.mktemp("tokenizer"), FAMILY)


@pytest.fixture
def load(tmp_path: Path, tokenizer):
    """uri -> index, in full."""

    def loaded(uri: Path, **fields) -> SourceIndex:
        source = Source(uri=str(uri), **fields)
        data = Data(sources={"s": source})
        report = ingest_source("s", source, data, tmp_path / "out")
        return load_index(build_index("s", source, report, tokenizer, FAMILY), FAMILY)

    return loaded


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def words(index: SourceIndex, row: int) -> str:
    sample, _ = read_sample(index, row)
    return "|".join(item.get("text", f"<{item['type']}>") for message in sample.messages for item in message["content"])


def test_parquet_in_the_hugging_face_layout(tmp_path: Path, load) -> None:
    image = {"bytes": picture(0), "path": "0.jpg"}
    (tmp_path / "beside.jpg").write_bytes(picture(3))
    rows = [
        {"image": image, "text": "one", "images": None, "messages": None},
        {"image": None, "text": None, "images": [image, {"bytes": picture(1, "PNG"), "path": None}],
         "messages": [{"role": "user", "content": "<image><image>Which?"}, {"role": "assistant", "content": "Both."}]},
        {"image": {"bytes": None, "path": "beside.jpg"}, "text": "by path", "images": None, "messages": None},
        {"image": {"bytes": b"no image", "path": "x.jpg"}, "text": "bad", "images": None, "messages": None},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=2)
    index = load(tmp_path / "train.parquet")
    assert [words(index, row) for row in range(3)] == ["<image>|one", "<image>|<image>|Which?|Both.", "<image>|by path"]
    assert index.refused == {"not_an_image": 1}
    assert [str(name) for name in index.ids] == ["train-0000001", "train-0000002", "train-0000003"]
    assert read_sample(index, 0)[1] == [picture(0)]


def test_llava_json(tmp_path: Path, load) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": "1", "image": "a.jpg", "conversations": turns}, {"id": "2", "conversations": turns}]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    index = load(tmp_path / "llava.json", kind="instruction")
    assert words(index, 0) == "<image>|\nWhat?|A cat."
    assert index.refused == {"placeholder_mismatch": 1}


def test_image_folders_with_captions(tmp_path: Path, load) -> None:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for number, kind in enumerate(("JPEG", "PNG", "WEBP", "JPEG")):
        extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
        (folder / ("deep" if number == 2 else "") / f"{number}.{extension}").write_bytes(picture(number, kind))
    (folder / "0.txt").write_text("zero\n")
    (folder / "1.json").write_text('{"caption": "one"}')
    (folder / "deep" / "2.caption").write_text("two")
    index = load(folder)
    assert [words(index, row) for row in range(3)] == ["<image>|zero", "<image>|one", "<image>|two"]
    assert index.refused == {"empty_text": 1}
    assert [str(name) for name in index.ids] == ["0", "1", "deep/2"]
    (folder / "deep" / "0.jpg").write_bytes(picture(8))
    for place, rows in ((folder, ["3.jpg|three", "3.jpg|the same again"]), (folder / "deep", ["0.jpg|of the deep one"])):
        lines = [json.dumps(dict(zip(("file_name", "text"), row.split("|")))) for row in rows]
        (place / "metadata.jsonl").write_text("\n".join(lines))
    index = load(folder)
    assert [words(index, row) for row in range(6)] == [
        "<image>|of the deep one", "<image>|three", "<image>|the same again", "<image>|zero", "<image>|one", "<image>|two",
    ]  # fmt: skip
    assert [read_sample(index, row)[1] for row in (0, 1)] == [[picture(8)], [picture(3)]]
    assert index.refused == {}
    (folder / "metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "not what 0.txt says"}')
    assert load(folder).refused == {"unknown_field": 1, "empty_text": 1}


def test_text_files(tmp_path: Path, load) -> None:
    (tmp_path / "a.txt").write_text("first document\nwith lines\n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe broken")
    index = load(tmp_path, kind="text")
    assert words(index, 0) == "first document\nwith lines"
    assert index.refused == {"bad_row": 1}


def test_tars_as_they_are_found(tmp_path: Path, load) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(
        folder / "000.tar",
        {
            "000.jpg": picture(0), "000.txt": b"plain", "000.json": b'{"url": "http://x", "caption": "plain", "width": 3}',
            "000.cls": b"7",
            "001.png": picture(1, "PNG"), "001.caption": b"from caption",
            "002.jpg": picture(2), "002.json": b'{"caption": "from json"}',
            "dir/003.0.jpg": picture(3), "dir/003.10.webp": picture(4, "WEBP"), "dir/003.2.jpg": picture(5),
            "dir/003.json": json.dumps({"messages": [{"role": "user", "content": "<image><image><image>?"}, TURNS[1]]}).encode(),
            "004.jpg": picture(6), "004.second.jpg": picture(7),
            "004.json": json.dumps({"images": ["004.second.jpg", "004.jpg"], "text": "swapped"}).encode(),
            "005.jpg": picture(8)[:500], "005.txt": b"cut image",
            "006.jpg": picture(9),
            "007.txt": b"text alone",
            "008.jpg": picture(10), "008.seg.png": picture(11, "PNG"), "008.txt": b"with its mask",
            "009.left.jpg": picture(12), "009.right.jpg": picture(13), "009.txt": b"in which order?",
        },
    )  # fmt: skip
    write_tar(folder / "001.tar", {"000.jpg": picture(20), "000.txt": b"same key, other shard"})
    (folder / "002.tar.gz").write_bytes(gzip.compress((folder / "001.tar").read_bytes()))
    (folder / "003.tar").write_bytes((folder / "000.tar").read_bytes()[:-12_000])
    (folder / "004.tar").write_bytes(b"not a tar at all" * 100)
    index = load(folder, kind="document")
    assert index.refused["unknown_field"] == 1 + 1  # the mask, in the whole archive and in the cut one
    assert index.refused["unsupported"] >= 1  # left and right
    index = load(folder, kind="document", ignore=["seg.png"])
    assert [words(index, row) for row in range(9)] == [
        "<image>|plain", "<image>|from caption", "<image>|from json", "<image>|<image>|<image>|?|A cat.",
        "<image>|<image>|swapped", "text alone", "<image>|with its mask", "<image>|same key, other shard",
        "<image>|same key, other shard",
    ]  # fmt: skip
    assert read_sample(index, 3)[1] == [picture(3), picture(5), picture(4, "WEBP")]  # 0, 2, 10
    assert read_sample(index, 4)[1] == [picture(7), picture(6)]
    assert read_sample(index, 6)[1] == [picture(10)]
    assert [str(name) for name in index.ids[7:9]] == ["001-000", "002-000"]
    assert index.refused["unreadable_shard"] == 3  # the cut one from its cut on, the sample in it, and the one that is no tar
    assert index.refused["truncated_image"] >= 1
    assert [Path(shard).parent == folder for shard in index.shards] == [True, True, False, True, True]  # indexed where they lie


@pytest.mark.parametrize("method", ["gzip", "bzip2", "xz", "zstd"])
def test_compressed_tars_are_rewritten(method: str, tmp_path: Path, load) -> None:
    folder = tmp_path / "tars"
    (folder / "deep").mkdir(parents=True)
    write_tar(folder / "plain.tar", {f"{n}.{kind}": content for n in range(3) for kind, content in pair_of(n).items()})
    content = (folder / "plain.tar").read_bytes()
    packed = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}[method](content)
    ending = {"gzip": "tgz", "bzip2": "tar.bz2", "xz": "tar.xz", "zstd": "tar.zst"}[method]
    (folder / "deep" / f"a.{ending}").write_bytes(packed)
    (folder / "named.tar").write_bytes(packed)  # the bytes decide, not the name
    (folder / "zcut.tar.gz").write_bytes(packed[: int(len(packed) * 0.6)])
    index = load(folder)
    ids = [str(name) for name in index.ids]
    assert ids[:9] == [f"{name}-{n}" for name in ("deep-a", "named", "plain") for n in range(3)]
    assert set(ids[9:]) < {f"zcut-{n}" for n in range(3)}
    for row in range(9):
        assert words(index, row) == f"<image>|caption {row % 3}"
        assert read_sample(index, row)[1] == [picture(row % 3, side=120)]
    assert Path(index.shards[0]).read_bytes() == content
    assert index.refused["unreadable_shard"] >= 1
    lines = [json.loads(line) for line in (Path(index.folder) / "refused.jsonl").read_text().splitlines()]
    assert [line["origin"] for line in lines if "cannot be decompressed" in line["detail"]] == ["zcut.tar.gz"]


def test_unpacking_goes_on_after_a_kill_and_stops_at_a_bomb(tmp_path: Path, load, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        write_tar(tmp_path / "plain.tar", {f"{number}.{kind}": content for kind, content in pair_of(number).items()})
        (folder / f"{number}.tar.gz").write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    real, opened = unpack.opened, []

    def failing(packed, method):
        opened.append(packed.name)
        if len(opened) == 2:
            raise KeyboardInterrupt
        return real(packed, method)

    monkeypatch.setattr(unpack, "opened", failing)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert [words(index, 0) for index in [load(folder)]] == ["<image>|caption 0"]
    assert [Path(name).name for name in opened] == ["0.tar.gz", "1.tar.gz", "1.tar.gz", "2.tar.gz"]
    write_tar(tmp_path / "bomb.tar", {**{f"0.{kind}": content for kind, content in pair_of(9).items()}, "1.txt": bytes(20 * 2**20)})
    (folder / "3.tar.gz").write_bytes(gzip.compress((tmp_path / "bomb.tar").read_bytes()))
    index = load(folder)
    assert [str(name) for name in index.ids] == ["0-0", "1-1", "2-2", "3-0"]
    assert "decompression bomb" in (Path(index.folder) / "refused.jsonl").read_text()


def pair_of(number: int) -> dict[str, bytes]:
    return {"jpg": picture(number, side=120), "txt": f"caption {number}".encode()}


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def test_long_json_lines_are_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "UNIT_BYTES", 2**20)
    path = tmp_path / "long.jsonl"
    rows = [{"id": str(n), "text": "é\u2028" * (n % 50)} for n in range(60_000)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    units = plan_units(Listing("jsonl", {"jsonl": list_files(str(path))}), str(tmp_path), DEFAULT_STORAGE)
    assert len(units) > 3
    found = [(origin, row["id"]) for unit in units for origin, _, row, _ in read_rows(unit, DEFAULT_STORAGE)]
    assert found == [(f"long.jsonl:{n + 1}", str(n)) for n in range(60_000)]


def test_what_lies_in_a_folder_decides_its_format(tmp_path: Path) -> None:
    def found(*names: str, **fields) -> str:
        folder = tmp_path / "-".join(names).replace("/", "_")
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        return list_source("s", Source(uri=str(folder), **fields), DEFAULT_STORAGE).name

    assert found("a.jsonl", "images/a.jpg") == "jsonl"
    assert found("a.json", "images/a.jpg") == "json"
    assert found("metadata.jsonl", "a.jpg") == "image_folder"
    assert found("a.json", "a.jpg") == "image_folder"
    assert found("a.jpg", "a.txt") == "image_folder"
    assert found("a.tar", "a.jsonl", "b.parquet") == "webdataset+parquet+jsonl"
    assert found("a.txt", "b.txt") == "text"
    assert found("a.parquet", "README.md") == "parquet"
    with pytest.raises(InputError, match=r"nothing at .* has a known format"):
        found("a.xyz")
    with pytest.raises(InputError, match="format is parquet"):
        found("b.txt", format="parquet")
