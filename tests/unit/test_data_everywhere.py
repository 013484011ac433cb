"""Every format through `terrace ingest`, `index`, `order` and `inspect`, from a folder and from S3: the same packs, the same page."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import s3_server

from terrace import cli
from terrace.recipe.schema import Storage
from terrace.storage.s3 import s3

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
COUNT = 6


def picture(number: int, kind: str = "JPEG") -> bytes:
    values = np.random.default_rng(number).integers(0, 255, (12, 9 + number, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((80 + 8 * number, 96)).save(buffer, kind)
    return buffer.getvalue()


def write_pictures(folder: Path) -> None:
    (folder / "images").mkdir()
    for number in range(COUNT):
        (folder / "images" / f"{number}.jpg").write_bytes(picture(number))


def write_json(path: Path, rows: list[dict], lines: bool) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(COUNT):
            members = {"jpg": picture(number), "txt": f"word caption {number}".encode()}
            if number == 3:
                members = {"png": picture(number, "PNG"), "json": json.dumps({"caption": f"word caption {number}"}).encode()}
            if number == 4:
                members = {"0.jpg": picture(4), "1.webp": picture(5, "WEBP"), "caption": b"word caption 4"}
            for suffix, content in members.items():
                header = tarfile.TarInfo(f"{number:03d}.{suffix}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def webdataset(folder: Path) -> None:
    (folder / "000.tar").write_bytes(tar_bytes())


def compressed_webdataset(folder: Path) -> None:
    (folder / "000.tar.gz").write_bytes(gzip.compress(tar_bytes()))


def parquet(folder: Path) -> None:
    images = [{"bytes": picture(number), "path": f"{number}.jpg"} for number in range(COUNT)]
    rows = [{"image": image, "text": f"word caption {number}", "images": None, "messages": None} for number, image in enumerate(images)]
    turns = [{"role": "user", "content": "<image><image>word?"}, {"role": "assistant", "content": "word caption 2"}]
    rows[2] = {"image": None, "text": None, "images": images[:2], "messages": turns}
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet", row_group_size=4)


def llava(folder: Path) -> None:
    write_pictures(folder)
    turns = lambda n: [{"from": "human", "value": "<image>\nword?"}, {"from": "gpt", "value": f"word caption {n}"}]  # noqa: E731
    rows = [{"id": f"{n:03d}", "image": f"images/{n}.jpg", "conversations": turns(n)} for n in range(COUNT)]
    write_json(folder / "llava.json", rows, lines=False)


def swift(folder: Path) -> None:
    write_pictures(folder)
    turns = lambda n: [  # noqa: E731
        {"role": "user", "content": "<image>Where is the word?"}, {"role": "assistant", "content": f"word caption {n} at <bbox>"},
    ]  # fmt: skip
    rows = [
        {"messages": turns(n), "images": [f"images/{n}.jpg"], "objects": {"ref": [], "bbox": [[8, 10, 60 + n, 70]]}} for n in range(COUNT)
    ]
    write_json(folder / "swift.jsonl", rows, lines=True)


def openai(folder: Path) -> None:
    write_pictures(folder)
    inline = "data:image/jpeg;base64," + base64.b64encode(picture(1)).decode()
    rows = []
    for number in range(COUNT):
        url = inline if number == 1 else f"images/{number}.jpg"
        question = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "word?"}]
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"word caption {number}"}]})
    write_json(folder / "openai.jsonl", rows, lines=True)


def image_folder(folder: Path) -> None:
    for number in range(COUNT):
        (folder / f"{number:03d}.jpg").write_bytes(picture(number))
        (folder / f"{number:03d}.txt").write_text(f"word caption {number}\n")


def image_table(folder: Path) -> None:
    write_pictures(folder)
    rows = [{"file_name": f"{number}.jpg", "text": f"word caption {number}"} for number in range(COUNT)]
    write_json(folder / "images" / "metadata.jsonl", rows, lines=True)


def plain_text(folder: Path) -> None:
    for number in range(COUNT):
        (folder / f"{number}.txt").write_text(f"word caption {number}\n" + "more words. " * (number + 3))


FORMATS: dict[Callable[[Path], None], tuple[str, str, int]] = {  # writer: kind, format that is told, pictures of all samples
    webdataset: ("caption", "webdataset", 7),
    compressed_webdataset: ("caption", "webdataset", 7),
    parquet: ("caption", "parquet", 7),
    llava: ("instruction", "json", 6),
    swift: ("grounding", "jsonl", 6),
    openai: ("instruction", "jsonl", 6),
    image_folder: ("caption", "image_folder", 6),
    image_table: ("caption", "image_folder", 6),
    plain_text: ("text", "text", 0),
}


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, s3_server.serve_s3() as running:
        for name, value in s3_server.ACCESS.items():
            patch.setenv(name, value)
        s3(Storage(endpoint_url=running.url)).mkdir("formats")
        yield running


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_a_format_through_every_command(write, tmp_path: Path, server, capsys: pytest.CaptureFixture[str]) -> None:
    kind, told, pictures = FORMATS[write]
    rows = tmp_path / "rows"
    rows.mkdir()
    write(rows)
    uri = f"s3://formats/{write.__name__}"
    s3(Storage(endpoint_url=server.url)).put(str(rows) + "/", uri, recursive=True)

    def said(*arguments: str) -> str:
        status = cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    packs, pages = [], []
    for name, place in (("local", str(rows)), ("s3", uri)):
        recipe, run = tmp_path / f"{name}.yaml", tmp_path / name
        values = yaml.safe_load(TINY.read_text())
        values["data"] = {"sources": {"captions": {"uri": place, "kind": kind}}, "storage": {"endpoint_url": server.url}}
        values["tokenizer"] = {"train_vocabulary_size": 320}
        values["stages"] = values["stages"][:1]
        values["stages"][0]["train"] = {"language": {"lr": 1e-3}}  # which text has a gradient for
        recipe.write_text(yaml.safe_dump(values))
        common = [recipe, "--run-dir", run]

        ingested = json.loads(said("ingest", *common, "--json"))
        assert (ingested["format"], ingested["refused"]) == (told, {})
        assert ingested["rewritten"] == (write is compressed_webdataset)
        indexed = json.loads(said("index", *common, "--json"))
        assert (indexed["samples"], indexed["refused"]) == (COUNT, {})

        order = json.loads(said("order", *common, "projector-warmup", "--packs", "16", "--json"))
        seen = [sample["id"] for pack in order["packs"] for sample in pack["samples"]]
        assert len(set(seen)) == COUNT
        assert all(pack["tokens"] == sum(sample["tokens"] for sample in pack["samples"]) for pack in order["packs"])
        packs.append(order["packs"])

        said("inspect", f"{recipe}:projector-warmup", "--run-dir", run, "--samples", "9", "--packs", "0", "--out", tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert page.count("data:image/jpeg;base64,") == pictures
        read = re.sub(r"<[^>]+>", "", page)
        assert all(f"caption {number}" in read for number in range(COUNT))
        assert ('<rect class="line answer"' in page) == (write is swift)
        pages.append(page.replace(uri, str(rows)))
    assert packs[0] == packs[1]
    assert pages[0] == pages[1]
