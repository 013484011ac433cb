"""Folders, tables and tars as they are found, made here: every file is read, or told, and never the wrong half of a sample."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_reading import FAMILY, Reading
from PIL import Image

from terrace.data.order.eligible import Fitting
from terrace.data.order.stored import stored_source
from terrace.data.sources import readers, shard_walk
from terrace.data.tokenizer import train_tokenizer
from terrace.errors import InputError
from terrace.recipe.schema import Source
from terrace.storage.files import list_files
from terrace.storage.s3 import DEFAULT_STORAGE

PIXELS = (784, 401_408)
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def picture(seed: int = 0, kind: str = "JPEG") -> bytes:
    values = np.random.default_rng(seed).integers(0, 255, (36, 44, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def tar(members: list[tuple[Any, ...]], end: bool = True) -> bytes:
    """A tar of (name, bytes) files and (name, type, target) links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content, *target in members:
            header = tarfile.TarInfo(name)
            if target:
                header.type, header.linkname = content, target[0]
                archive.addfile(header)
            else:
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
        cut = archive.offset
    return buffer.getvalue() if end else buffer.getvalue()[:cut]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(["a cat", "two cats"] * 4, 320, tmp_path_factory.mktemp("tokenizer"), FAMILY)


@pytest.fixture
def read(tmp_path: Path, tokenizer):
    """Writes {name: bytes or text} into a folder and reads the folder (or `only` one file of it)."""

    def reading(files: dict[str, Any], only: str = "", **fields: Any) -> Reading:
        folder = tmp_path / f"in-{len(list(tmp_path.iterdir()))}"
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return Reading(folder / only, tmp_path / f"out-{folder.name}", tokenizer, **{"kind": "text", **fields})

    return reading


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


# ---------------------------------------------------------------- files of rows


def test_rows_in_every_layout_of_json(read) -> None:
    rows = [{"text": f"row {number}"} for number in range(3)]
    expected = ["row 0", "row 1", "row 2"]
    plain = lines(*rows)
    for name, content in {
        "a.json": plain, "b.jsonl": json.dumps(rows), "c.json": json.dumps(rows, indent=1), "d.jsonl": json.dumps(rows, indent=1),
        "e.json": "\n\n".join(json.dumps(row, indent=2) for row in rows), "f.json": json.dumps({"version": 1, "data": rows}),
        "g.jsonl.gz": gzip.compress(plain.encode()), "h.jsonl.zst": zstd(plain.encode()),
        "i.json.gz": gzip.compress(json.dumps(rows).encode()),
        "j.json.zst": zstd(json.dumps(rows).encode()), "k.ndjson": "\ufeff" + plain, "l.json.gz": gzip.compress(plain.encode()),
        "m.csv": "text\r\nrow 0\r\nrow 1\r\nrow 2\r\n", "n.tsv": "text\tid\nrow 0\t1\nrow 1\t2\nrow 2\t3\n",
        "o.csv.gz": gzip.compress(b"text\nrow 0\nrow 1\nrow 2"),
    }.items():  # fmt: skip
        found = read({name: content})
        assert (found.words, found.refused) == (expected, []), name


def test_a_compressed_file_that_is_cut_is_used_up_to_there(read) -> None:
    rows = [{"text": f"row {number} " + "x" * 50} for number in range(2000)]
    packed = gzip.compress(lines(*rows).encode(), 1)
    found = read({"a.jsonl.gz": packed[: len(packed) // 2], "b.jsonl": lines({"text": "whole"})})
    assert 100 < len(found.samples) < 2001
    assert found.words[-1] == "whole"
    assert found.reasons[-1] == "unreadable_shard"


def test_everything_that_lies_in_a_folder_is_read_or_told(read) -> None:
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["from parquet"]}), table)
    files = {
        "a.parquet": table.getvalue(), "b.jsonl": lines({"text": "from jsonl"}), "c.json": json.dumps([{"text": "from json"}]),
        "d.csv": "text\nfrom csv\n", "e.tar": tar([("0.txt", b"from a tar")]), "README.md": "what this is", "clip.mp4": b"0", "x.zip": b"0",
        "state.json": "{}",
    }  # fmt: skip
    found = read(files)
    assert sorted(found.words) == ["from a tar", "from csv", "from json", "from jsonl", "from parquet"]
    assert sorted(found.reasons) == ["not_a_sample", "unsupported", "unsupported"]
    assert "1 files end in .mp4" in found.told
    assert read(files, format="jsonl").words == ["from jsonl"]
    documents = read({"a.txt": "a document", "README.md": "about it", "b.md": "another"})
    assert (documents.words, documents.reasons) == (["a document", "another"], ["not_a_sample"])


def test_csv_rows_say_all_they_say_or_are_refused(read) -> None:
    found = read({"a.csv": 'text,id\nfine,1\n"a, b",2\na, b,3\nonly text\n'})
    assert found.words == ["fine", "a, b"]
    assert found.reasons == ["bad_row", "bad_row"]
    assert "3 fields, the header 2" in found.told
    assert "fewer fields than the header: id missing" in found.told
    assert read({"a.csv": "text\ncafé\n".encode("latin-1")}).reasons == ["bad_row"]
    assert read({"a.csv": "text\ncafé\n".encode("utf-16")}).words == ["café"]


def test_text_is_decoded_or_refused(read) -> None:
    picture_of = {"a.jpg": picture()}
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        found = read({**picture_of, "a.txt": "Un café crème.".encode(encoding)}, kind="caption")
        assert found.words == ["<0>Un café crème."], encoding
    for encoding in ("latin-1", "utf-16-le", "cp1252"):
        found = read({**picture_of, "a.txt": "Un café crème.".encode(encoding)}, kind="caption")
        assert found.reasons == ["bad_row"], encoding
        assert "save it as UTF-8" in found.told


def test_a_row_that_is_too_large_is_refused_and_the_next_is_read(read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1_000)
    for ending in ("", ".gz"):
        content = lines({"text": "before"}, {"text": "x" * 50_000}, {"text": "after"}).encode()
        found = read({f"a.jsonl{ending}": gzip.compress(content) if ending else content})
        assert found.words == ["before", "after"]
        assert found.reasons == ["too_large"]
        assert "the row has 50,0" in found.told
        assert "a.jsonl" in found.told


def test_a_damaged_row_group_is_lost_alone(read) -> None:
    table = pa.table({"text": [f"text {number} " + str(np.random.default_rng(number).integers(0, 9**9)) * 40 for number in range(300)]})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=100)
    content = bytearray(sink.getvalue())
    place = pq.ParquetFile(sink).metadata.row_group(1).column(0).data_page_offset
    content[place : place + 400] = b"\xff" * 400
    found = read({"a.parquet": bytes(content)})
    assert [line.split()[1] for line in found.words] == [str(number) for number in (*range(100), *range(200, 300))]
    assert found.reasons == ["unreadable_shard"]
    assert "row group 1 of a.parquet cannot be read, 100 of its rows are lost" in found.told
    assert found.samples[100].id == "a-0000201"


# ---------------------------------------------------------------- LLaMA-Factory


def test_a_dataset_info_maps_columns_and_tags(read) -> None:
    chat = [{"speaker": "person", "said": "<image>C?"}, {"speaker": "machine", "said": "Red"}]
    entries = {
        "plain": {"file_name": "plain.json"},
        "renamed": {"file_name": "renamed.jsonl", "columns": {"prompt": "ask", "query": "more", "response": "reply", "system": "rule"}},
        "chat": {
            "file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "pictures"},
            "tags": {"role_tag": "speaker", "content_tag": "said", "user_tag": "person", "assistant_tag": "machine"},
        },
        "ranked": {"file_name": "ranked.json", "formatting": "sharegpt", "ranking": True,
                   "columns": {"messages": "conversations", "chosen": "better", "rejected": "worse"}},
        "kto": {"file_name": "kto.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "good"},
                "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
        "hub": {"hf_hub_url": "somebody/data"},
        "gone": {"file_name": "gone.json"},
    }  # fmt: skip
    files = {
        "dataset_info.json": json.dumps(entries), "a.jpg": picture(),
        "plain.json": json.dumps([{"instruction": "Add.", "input": "2+2", "output": "4"}]),
        "renamed.jsonl": lines({"ask": "Add.", "more": "", "reply": "5", "rule": "Be brief.", "licence": "MIT"}),
        "chat.json": json.dumps([{"talk": chat, "pictures": ["a.jpg"]}]),
        "ranked.json": json.dumps([{"conversations": [{"from": "human", "value": "C?"}], "better": {"from": "gpt", "value": "Red"},
                                    "worse": {"from": "gpt", "value": "Blue"}}]),
        "kto.json": json.dumps([{"messages": HI, "good": True}, {"messages": HI, "good": False}]),
    }  # fmt: skip
    for only in ("", "dataset_info.json"):
        found = read(files, only, kind="qa")
        assert found.words == [
            "user: Add.\n2+2| assistant: 4", "system: Be brief.| user: Add.| assistant: 5", "user: <0>C?| assistant: Red",
            "user: C?| assistant: Red", "user: Hi| assistant: Hello",
        ]  # fmt: skip
        assert found.samples[3].metadata["rejected"] == [{"type": "text", "text": "Blue"}]
        assert sorted(found.reasons) == ["unsupported", "unsupported", "unwanted_answer"]
        assert "entry hub: it names no local file" in found.told
    assert read(files, kind="qa", datasets=["kto"]).words == ["user: Hi| assistant: Hello"]
    assert "there is no entry nothing" in read(files, kind="qa", datasets=["kto", "nothing"]).told


# ---------------------------------------------------------------- image folders


def test_every_folder_has_its_own_metadata_and_a_picture_may_have_several_captions(read) -> None:
    files = {f"{part}/0.jpg": picture(number) for number, part in enumerate(("train", "test"))}
    files |= {f"{part}/metadata.csv": f"file_name,text\n0.jpg,of {part}\n0.jpg,again of {part}\n" for part in ("train", "test")}
    found = read(files, kind="caption")
    assert found.words == ["<0>of test", "<0>again of test", "<0>of train", "<0>again of train"]
    assert [images[0] for images in found.images] == [picture(1), picture(1), picture(0), picture(0)]
    several = read({"a.jpg": picture(), "a.jsonl": lines({"image": "a.jpg", "captions": ["one", "two"]})}, kind="caption")
    assert several.words == ["<0>one", "<0>two"]
    assert len({sample.id for sample in several.samples}) == 2


# ---------------------------------------------------------------- tars


def test_members_that_lie_apart_are_never_half_a_sample(read) -> None:
    apart = tar([("1.txt", b"one"), ("2.txt", b"two"), ("1.jpg", picture(1)), ("3.jpg", picture(3)), ("3.txt", b"three")])
    found = read({"a.tar": apart}, kind="document")
    assert found.words == ["two", "<0>three"]
    assert found.reasons == ["split_sample", "split_sample"]  # what came before, and what comes back
    assert "1.tar" not in found.told
    twice = tar([("1.jpg", picture(1)), ("1.txt", b"one")]) + tar([("1.jpg", picture(2)), ("1.txt", b"one")])
    found = read({"a.tar": twice}, kind="caption")
    assert found.words == ["<0>one", "<0>one"]
    assert [sample.id for sample in found.samples] == ["a-1", "a-1-2"]
    assert [images[0] for images in found.images] == [picture(1), picture(2)]


def test_links_are_followed_and_those_into_nothing_refused(read) -> None:
    members = [("d/1.jpg", picture(1)), ("d/1.txt", b"one"), ("d/2.jpg", tarfile.LNKTYPE, "d/1.jpg"), ("d/2.txt", b"two"),
               ("e/3.jpg", tarfile.SYMTYPE, "../d/2.jpg"), ("e/3.txt", b"three"), ("e/4.jpg", tarfile.SYMTYPE, "../gone.jpg"),
               ("e/4.txt", b"four"), ("e/5.jpg", tarfile.SYMTYPE, "5.jpg"), ("e/5.txt", b"five")]  # fmt: skip
    found = read({"a.tar": tar(members)}, kind="caption")
    assert found.words == ["<0>one", "<0>two", "<0>three"]
    assert [images[0] for images in found.images] == [picture(1)] * 3
    assert found.reasons == ["missing_image", "missing_image"]
    assert found.samples[0].id == "a-d/1"


def test_pictures_that_exif_turns_are_upright_in_tars_and_rows_or_lie_where_the_source_says_so(read) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter turn
    Image.open(io.BytesIO(picture())).save(buffer, "JPEG", exif=exif)
    files = {"a.tar": tar([("1.jpg", buffer.getvalue()), ("1.txt", b"one"), ("2.jpg", picture()), ("2.txt", b"two")])}
    rows = {"turned.jpg": buffer.getvalue(), "plain.jpg": picture(),
            "rows.jsonl": lines(*({"image": f"{name}.jpg", "text": name} for name in ("turned", "plain")))}  # fmt: skip
    for found in (read(files, kind="caption"), read(rows, "rows.jsonl", kind="caption")):
        assert [found.index.sizes(row) for row in range(2)] == [[(36, 44)], [(44, 36)]]
    for lying in (read(files, kind="caption", exif="ignore"), read(rows, "rows.jsonl", kind="caption", exif="ignore")):
        assert [lying.index.sizes(row) for row in range(2)] == [[(44, 36)], [(44, 36)]]


def test_an_archive_without_its_end_loses_its_last_sample_alone(read) -> None:
    members = [("1.jpg", picture(1)), ("1.txt", b"one"), ("2.jpg", picture(2)), ("2.txt", b"two")]
    found = read({"a.tar": tar(members, end=False)}, kind="caption")
    assert found.words == ["<0>one"]
    assert found.reasons == ["unreadable_shard", "unreadable_shard"]
    damaged = bytearray(tar(members))
    place = damaged.index(b"2.jpg")
    damaged[place + 150] ^= 0xFF  # its header's checksum
    found = read({"a.tar": bytes(damaged)}, kind="caption")
    assert found.words == []
    assert "is damaged" in found.told


def test_members_that_nobody_reads_are_named(read, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [("1.jpg", picture(1)), ("1.txt", b"one")]
    for name in ("1.seg.png", "1.mp4", "1.npy", "1.heic", "1.info.txt", "1.mask.png"):
        found = read({"a.tar": tar([*pair, (name, picture(2, "PNG"))])}, kind="caption")
        assert found.reasons == ["unknown_field"]
        assert f"nobody reads the member {name}" in found.told
        ignored = read({"a.tar": tar([*pair, (name, picture(2, "PNG"))])}, kind="caption", ignore=[name[2:]])
        assert ignored.words == ["<0>one"]
        assert [len(images) for images in ignored.images] == [1]
    for name in ("__key__", "__meta__/1.txt", ".hidden.txt", "1.cls", "1.url"):
        assert read({"a.tar": tar([*pair, (name, b"x")])}, kind="caption").words == ["<0>one"]
    dotted = tar([("v1.5_a.jpg", picture(1)), ("v1.5_a.txt", b"one")])
    assert "the key of a sample ends at the first dot" in read({"a.tar": dotted}, kind="caption").told
    monkeypatch.setattr(shard_walk, "MAX_MEMBER_BYTES", 2_000)
    large = read({"a.tar": tar([*pair, ("2.jpg", picture(2)), ("2.txt", b"x" * 3_000)])}, kind="caption")
    assert (large.words, large.reasons) == (["<0>one"], ["too_large"])


@pytest.mark.parametrize("content", ["[1, 2]", "5", '"x"', "{", '{"terrace": 1, "caption": "x"}', '{"terrace": 1, "id": 1}', "[[]]", "[{}]",
                                     '{"messages": {"a": 1}}', '{"id": "\\ud800", "text": "x"}', '{"images": 5, "text": "x"}',
                                     '{"images": [{"bytes": 3}], "text": "x"}', "\xff"])  # fmt: skip
def test_a_json_member_that_is_no_row_ends_nothing_but_itself(content: str, read) -> None:
    members = [("1.jpg", picture(1)), ("1.json", content.encode("latin-1")), ("2.jpg", picture(2)), ("2.txt", b"two")]
    found = read({"a.tar": tar(members)}, kind="caption")
    assert found.words[-1] == "<0>two"
    assert len(found.words) == 1
    assert len(found.refused) == 1


# ---------------------------------------------------------------- links and addresses on disk


def test_links_on_disk_and_foreign_addresses(read, tmp_path: Path, tokenizer) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines({"text": "once"}))
    (folder / "again").symlink_to(".")
    (folder / "self").symlink_to("self")
    (folder / "notes.md").symlink_to("/nowhere/notes.md")
    assert [Path(file.uri).name for file in list_files(str(folder), DEFAULT_STORAGE)] == ["a.jsonl", "notes.md", "self"]
    assert Reading(folder, tmp_path / "out", tokenizer, kind="text").words == ["once"]
    (folder / "b.jsonl").symlink_to("/nowhere/b.jsonl")
    found = Reading(folder, tmp_path / "out-b", tokenizer, kind="text")
    assert (found.words, found.reasons) == (["once"], ["unreadable_shard"])
    bracket = tmp_path / "a[1"
    bracket.mkdir()
    (bracket / "a[b].jsonl").write_text(lines({"text": "in brackets"}))
    assert Reading(bracket, tmp_path / "out-c", tokenizer, kind="text").words == ["in brackets"]
    for address in ("gs://bucket/rows.jsonl", "https://x.org/rows.jsonl", "hf://data"):
        with pytest.raises(InputError, match="fetch them first"):
            list_files(Source(uri=address).uri, DEFAULT_STORAGE)


def test_a_sample_with_more_visual_tokens_than_a_pack_may_have_is_refused(tmp_path: Path, tokenizer) -> None:
    """Though its text and pictures together are shorter than the sequence: one sample alone would fill the vision tower's memory."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    sides = (56, 112, 224)  # 4, 16 and 64 visual tokens
    for side in sides:
        Image.new("RGB", (side, side), "red").save(folder / f"{side}.png")
    rows = [json.dumps({"image": f"{side}.png", "text": "A red square."}) for side in sides]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    found = Reading(folder / "rows.jsonl", tmp_path / "out", tokenizer, kind="caption")
    assert found.index is not None
    assert sorted(found.index.visual_tokens(PIXELS).tolist()) == [4, 16, 64]
    for limit, kept in ((None, 3), (64, 3), (63, 2), (15, 1), (3, 0)):
        made = stored_source("s", Source(uri="x", kind="caption"), found.index, Fitting(PIXELS, 1024, limit))
        assert (made.count, made.changes.get("refused", 0)) == (kept, 3 - kept), limit
