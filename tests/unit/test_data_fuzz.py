"""Anything at all as input: rows, members of tars, Parquet tables, folders of images raise nothing but refusals.

And an oracle that knows nothing of the reader: conversations are drawn first, written in one of the forms that people use, and must come
back with the same roles, texts, masks, pictures and boxes.
"""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_reading import FAMILY, Reading
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from terrace.data.image_files import ImageDamage, check_file, orientation, without_orientation
from terrace.data.images import decode_image, image_size
from terrace.data.sources.conventions import convert_row
from terrace.data.sources.fields import KNOWN
from terrace.data.sources.media import AUDIO_KEYS, IMAGE_KEYS, MAYBE_IMAGE_KEYS, VIDEO_KEYS
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.refusals import Refusal
from terrace.data.sources.shard_walk import scan_shard
from terrace.data.sources.shards import sample_of_members
from terrace.data.tokenizer import train_tokenizer

KINDS = ("caption", "document", "text", "ocr", "grounding", "qa", "preference", "prompt", "instruction")
SOME = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=7_000, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def colour(number: int, kind: str = "PNG") -> bytes:
    """A picture that no other number has."""
    buffer = io.BytesIO()
    Image.new("RGB", (30 + number, 40), (number * 40 % 256, 90, 200)).save(buffer, kind)
    return buffer.getvalue()


# ---------------------------------------------------------------- anything

KEYS = st.sampled_from(
    sorted({*KNOWN, *IMAGE_KEYS, *MAYBE_IMAGE_KEYS, *VIDEO_KEYS, *AUDIO_KEYS, "id", "from", "type", "index", "bytes", "path", "weight",
            "label", "function", "arguments", "name", "user", "assistant", "reward_model", "ground_truth", "terrace", "kind"})
) | st.text(max_size=6)  # fmt: skip
TEXTS = st.sampled_from(
    ["a.png", "", " ", "<image>", "<image><bbox>", "<video>?", "user", "assistant", "human", "gpt", "system", "tool", "text", "image",
     "video", "[1, 2]", '{"a": 1}', "[", "data:image/png;base64,AAAA", "s3://x/y", "../a.png", "/etc/passwd", "a\0b", "\ud800", "norm1000",
     "0", "false"]
) | st.text(max_size=8)  # fmt: skip
PLAIN = (
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | TEXTS | st.binary(max_size=4) | st.just(colour(1))
)  # fmt: skip
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
TURNS = st.lists(
    st.fixed_dictionaries({"role": TEXTS, "content": VALUES}, optional={"weight": PLAIN, "loss": PLAIN, "tool_calls": VALUES}) | VALUES,
    max_size=4,
)
ROWS = st.dictionaries(KEYS, VALUES, max_size=6) | st.fixed_dictionaries(
    {"messages": TURNS}, optional={"images": VALUES, "objects": VALUES, "tools": VALUES, "videos": VALUES, "system": VALUES, "label": PLAIN}
)


def convert(row: Any, kind: str) -> None:
    try:
        sample, images = convert_row(row, "x", kind)
        resolve_coordinates(sample.messages, [(30, 40)] * len(images))
    except Refusal:
        return
    assert sample.messages
    items = [item for message in sample.messages for item in message["content"]]
    shown = [item["image"] for item in items if item["type"] == "image"]
    shown += [frame for item in items if item["type"] == "video" for frame in item["frames"]]
    assert sorted(set(shown)) == list(range(len(images)))  # every picture is shown, none is made up


@SOME
@given(row=ROWS | VALUES, kind=st.sampled_from(KINDS))
def test_any_row(row: Any, kind: str) -> None:
    convert(row, kind)


@pytest.mark.slow
@MANY
@given(row=ROWS | VALUES, kind=st.sampled_from(KINDS))
def test_any_row_long(row: Any, kind: str) -> None:
    convert(row, kind)


SUFFIXES = st.sampled_from(["jpg", "png", "0.png", "1.png", "txt", "json", "caption", "seg.png", "mp4", "cls", "JPG", "a.b.c", ""])
CONTENTS = (
    st.sampled_from([colour(1), colour(2, "JPEG"), colour(1)[:40], b"", b"\xff\xfeA\0", b"a caption", b"caf\xe9"])
    | ROWS.map(lambda row: json.dumps(row, default=str).encode("utf-8", "replace"))
    | st.binary(max_size=40)
)
MEMBERS = st.lists(st.tuples(st.sampled_from(["1", "2", "d/1", "__m__", "README", "é"]), SUFFIXES, CONTENTS), max_size=6)


def archive(members: list[tuple[str, str, bytes]]) -> bytearray:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, suffix, content in members:
            header = tarfile.TarInfo(f"{key}.{suffix}" if suffix else key)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return bytearray(buffer.getvalue())


def walk(content: bytes, path: Path, kind: str) -> None:
    path.write_bytes(content)
    try:
        for group in scan_shard(str(path)):
            try:
                if group.refusal is not None:
                    raise group.refusal
                sample_of_members(group.key, group.data, group.key, kind)
            except Refusal:
                pass
    except Refusal:
        pass


DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3)


def damaged(content: bytearray, damage: list[tuple[float, int]], cut: float) -> bytes:
    for place, value in damage:
        if content:
            content[int(place * len(content))] = value
    return bytes(content[: int(len(content) * cut)])


@SOME
@given(members=MEMBERS, damage=DAMAGE, cut=st.sampled_from([1.0, 1.0, 0.5, 0.1]), kind=st.sampled_from(KINDS))
def test_any_tar(tmp_path_factory: pytest.TempPathFactory, members, damage, cut, kind) -> None:
    walk(damaged(archive(members), damage, cut), tmp_path_factory.getbasetemp() / "any.tar", kind)


@pytest.mark.slow
@MANY
@given(members=MEMBERS, damage=DAMAGE, cut=st.sampled_from([1.0, 1.0, 0.5, 0.1]), kind=st.sampled_from(KINDS))
def test_any_tar_long(tmp_path_factory: pytest.TempPathFactory, members, damage, cut, kind) -> None:
    walk(damaged(archive(members), damage, cut), tmp_path_factory.getbasetemp() / "any-long.tar", kind)


def look(content: bytes) -> None:
    for ask in (image_size, decode_image, check_file):
        with suppress(ImageDamage):
            ask(content)
    assert orientation(without_orientation(content)) == 1


PICTURES = st.sampled_from([colour(n, kind) for n, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))])


@SOME
@given(picture=PICTURES, damage=DAMAGE, cut=st.sampled_from([1.0, 0.9, 0.5, 0.02]))
def test_any_picture(picture: bytes, damage, cut) -> None:
    look(damaged(bytearray(picture), damage, cut))


@pytest.mark.slow
@MANY
@given(picture=PICTURES, damage=DAMAGE, cut=st.sampled_from([1.0, 0.9, 0.5, 0.02]))
def test_any_picture_long(picture: bytes, damage, cut) -> None:
    look(damaged(bytearray(picture), damage, cut))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(["a cat", "two cats"] * 4, 320, tmp_path_factory.mktemp("tokenizer"), FAMILY)


FILES = st.dictionaries(
    st.sampled_from(["a.jsonl", "b.json", "c.parquet", "d.csv", "e.tar", "f.png", "f.txt", "f.json", "g/f.jpg", "g/metadata.jsonl",
                     "metadata.csv", "h.txt", "i.jsonl.gz", "dataset_info.json", "README.md"]),
    CONTENTS, min_size=1, max_size=5,
)  # fmt: skip
COLUMNS = st.dictionaries(
    KEYS.filter(lambda key: key.isidentifier()),
    st.sampled_from([["x", None], [b"\xff", b"a"], [1, 2], [1.5, None], [True, False], [["a.png"], []],
                     [{"bytes": colour(1), "path": None}, None],
                     [[{"role": "user", "content": "a"}], None], [["x", "y"], None]]),
    min_size=1, max_size=5,
)  # fmt: skip


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    folder = root / f"in-{len(list(root.iterdir()))}"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@FEW
@given(files=FILES, columns=COLUMNS, damage=DAMAGE, kind=st.sampled_from(KINDS))
def test_any_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer, files, columns, damage, kind) -> None:
    root = tmp_path_factory.mktemp("folder")
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    files = {**files, "t.parquet": damaged(bytearray(sink.getvalue()), damage, 1.0)}
    found = Reading(folder_of(root, files), root / "out", tokenizer, kind=kind)
    assert all(line["detail"] for line in found.refused)


# ---------------------------------------------------------------- what goes in comes out

SAID = st.text(st.sampled_from("aé数🙂\"\\{}[]<> \n\t\u2028"), min_size=1, max_size=12).filter(lambda text: text.strip())
BOX = st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(11, 30), st.integers(11, 40)).map(list)


@st.composite
def conversations(draw: Any) -> list[dict[str, Any]]:
    """Turns of parts, the truth: ("text", words), ("image", number) and, in answers, ("box", image, numbers)."""
    turns: list[dict[str, Any]] = []
    images = 0
    if draw(st.booleans()):
        turns.append({"role": "system", "parts": [("text", draw(SAID))], "learnt": False})
    for _ in range(draw(st.integers(1, 3))):
        parts: list[tuple[Any, ...]] = [("image", images + number) for number in range(draw(st.integers(0, 2)))]
        images += len(parts)
        parts.append(("text", draw(SAID)))
        turns.append({"role": "user", "parts": parts, "learnt": False})
        answer: list[tuple[Any, ...]] = [("text", draw(SAID))]
        if images and draw(st.booleans()):
            answer.append(("box", draw(st.integers(0, images - 1)), draw(BOX)))
        turns.append({"role": "assistant", "parts": answer, "learnt": draw(st.booleans())})
    if not any(turn["learnt"] for turn in turns):
        turns[-1]["learnt"] = True
    return turns


def tagged(parts: list[tuple[Any, ...]]) -> str:
    return "".join({"text": lambda p: p[1], "image": lambda _: "<image>", "box": lambda _: "<bbox>"}[part[0]](part) for part in parts)


def boxes_of(turns: list[dict[str, Any]]) -> dict[str, Any]:
    boxes = [part for turn in turns for part in turn["parts"] if part[0] == "box"]
    return {"objects": {"bbox": [box for _, _, box in boxes], "image_id": [image for _, image, _ in boxes]}} if boxes else {}


def listed(parts: list[tuple[Any, ...]], named: bool) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for part in parts:
        if part[0] == "image":
            items.append({"type": "image", "image": f"{part[1]}.png"} if named else {"type": "image"})
        else:
            items.append({"type": "text", "text": part[1] if part[0] == "text" else "<bbox>"})
    return items


def row_of(turns: list[dict[str, Any]], form: str) -> dict[str, Any]:
    """The conversation in one of the forms."""
    count = sum(part[0] == "image" for turn in turns for part in turn["parts"])
    images = [f"{number}.png" for number in range(count)]
    masks = [{} if turn["learnt"] or turn["role"] != "assistant" else {"weight": 0} for turn in turns]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    row: dict[str, Any] = boxes_of(turns)
    if form == "llava":
        row |= {"conversations": [{"from": names[t["role"]], "value": tagged(t["parts"]), **mask} for t, mask in zip(turns, masks)]}
        return row | ({"image": images} if images else {})
    if form == "swift":
        row |= {"messages": [{"role": t["role"], "content": tagged(t["parts"]), **mask} for t, mask in zip(turns, masks)]}
        return row | {"images": images}
    if form == "named":
        return row | {"messages": [{"role": t["role"], "content": listed(t["parts"], True), **mask} for t, mask in zip(turns, masks)]}
    row |= {"messages": [{"role": t["role"], "content": listed(t["parts"], False), **mask} for t, mask in zip(turns, masks)]}
    row |= {"images": images}
    if form == "text":
        row["messages"] = json.dumps(row["messages"])
    return row


def compare(found: Reading, truths: list[list[dict[str, Any]]]) -> None:
    assert len(found.samples) == len(truths), found.told
    for sample, images, turns in zip(found.samples, found.images, truths):
        assert [message["role"] for message in sample.messages] == [turn["role"] for turn in turns]
        for message, turn in zip(sample.messages, turns):
            said = "".join(item["text"] for item in message["content"] if item["type"] == "text")
            assert said == "".join(part[1] for part in turn["parts"] if part[0] == "text")
            shown = [item["image"] for item in message["content"] if item["type"] == "image"]
            assert shown == [part[1] for part in turn["parts"] if part[0] == "image"]
            boxes = [(item["image"], item["box"]) for item in message["content"] if item["type"] == "box"]
            assert boxes == [(part[1], part[2]) for part in turn["parts"] if part[0] == "box"]
            assert (message["role"] == "assistant" and message.get("train", True)) == turn["learnt"]
        assert images == [colour(number) for number in range(len(images))]
        assert len(images) == sum(part[0] == "image" for turn in turns for part in turn["parts"])


def as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def written(root: Path, truths: list[list[dict[str, Any]]], forms: list[str], layout: str) -> Path:
    rows = [row_of(turns, form) for turns, form in zip(truths, forms)]
    folder = folder_of(root, {f"{number}.png": colour(number) for number in range(6)})
    if layout == "jsonl":
        (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif layout == "json":
        (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif layout == "parquet":
        pq.write_table(pa.table({"messages": [as_json(row.get("messages") or row["conversations"]) for row in rows],
                                 "image": [[{"bytes": colour(int(Path(name).stem)), "path": None}
                                            for name in row.get("images") or row.get("image") or []] for row in rows],
                                 "objects": [json.dumps(row["objects"]) if "objects" in row else None for row in rows]}),
                       folder / "rows.parquet")  # fmt: skip
    else:
        members = []
        for number, (row, turns) in enumerate(zip(rows, truths)):
            count = sum(part[0] == "image" for turn in turns for part in turn["parts"])
            members += [(f"{number}", f"{image}.png", colour(image)) for image in range(count)]
            members.append((f"{number}", "json", json.dumps(row).encode()))
        (folder / "rows.tar").write_bytes(archive(members))
    return folder


LAYOUTS = st.sampled_from(["jsonl", "json", "parquet", "tar"])
FORMS = st.sampled_from(["llava", "swift", "named", "items", "text"])


def come_and_go(root: Path, tokenizer: Any, drawn: list[tuple[list[dict[str, Any]], str]], layout: str) -> None:
    truths, forms = [turns for turns, _ in drawn], [form for _, form in drawn]
    if layout == "parquet":
        forms = ["items" if form == "named" else form for form in forms]
    compare(Reading(written(root, truths, forms, layout), root / "out", tokenizer, kind="qa"), truths)


@FEW
@given(drawn=st.lists(st.tuples(conversations(), FORMS), min_size=1, max_size=5), layout=LAYOUTS)
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, tokenizer, drawn, layout) -> None:
    come_and_go(tmp_path_factory.mktemp("oracle"), tokenizer, drawn, layout)


@pytest.mark.slow
@settings(FEW, max_examples=400)
@given(drawn=st.lists(st.tuples(conversations(), FORMS), min_size=1, max_size=5), layout=LAYOUTS)
def test_what_goes_in_comes_out_long(tmp_path_factory: pytest.TempPathFactory, tokenizer, drawn, layout) -> None:
    come_and_go(tmp_path_factory.mktemp("oracle"), tokenizer, drawn, layout)
