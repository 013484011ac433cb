"""Local and S3 storage: the same answers, ranges read together, passing faults ridden out, lasting ones named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import s3_server

from terrace.data.index.build import build_index
from terrace.data.index.source_index import load_index
from terrace.data.sources.ingest import ingest_source
from terrace.data.stream.read import read_located, read_sample
from terrace.data.tokenizer import train_tokenizer
from terrace.errors import DamagedData, InputError
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.recipe.schema import Data, Source, Storage
from terrace.storage import files as module
from terrace.storage.files import StorageError, is_passing, list_files, merge_ranges, read_file, read_ranges, s3, write_file

FAMILY = Qwen25VL()


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, s3_server.serve_s3() as running:
        for name, value in s3_server.ACCESS.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def storage(server, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Settings of an empty bucket, with a quick backoff."""
    monkeypatch.setattr(module, "BACKOFF_BASE_SECONDS", 0.01)
    monkeypatch.setattr(module, "BACKOFF_CAP_SECONDS", 0.05)
    server.fault = None
    settings = Storage(endpoint_url=server.url, max_attempts=8, timeout_seconds=10)
    filesystem = s3(settings)
    if filesystem.exists("bucket"):
        filesystem.rm("bucket", recursive=True)
    filesystem.mkdir("bucket")
    server.requests.clear()
    server.failed = 0
    return settings


def test_ranges_are_merged_and_come_back_in_order() -> None:
    assert merge_ranges([(100, 10), (0, 10), (10, 5)], gap=0) == [((0, 15), [1, 2]), ((100, 10), [0])]
    assert merge_ranges([(0, 10), (50, 10), (5, 100)], gap=20) == [((0, 105), [0, 2, 1])]
    assert merge_ranges([]) == []


def test_local_and_s3_give_the_same_answers(tmp_path: Path, storage: Storage, server) -> None:
    content = np.random.default_rng(0).integers(0, 256, 300_000).astype(np.uint8).tobytes()
    ranges = [(250_000, 100), (0, 10), (20, 5), (299_990, 50), (400_000, 5), (0, 0)]
    expected = [content[offset : offset + size] for offset, size in ranges]
    for root in (str(tmp_path), "s3://bucket/deep"):
        write_file(f"{root}/a.bin", content, storage)
        write_file(f"{root}/sub/c.txt", b"c", storage)
        write_file(f"{root}/.hidden", b"x", storage)
        assert [(file.uri, file.size) for file in list_files(root, storage)] == [
            (f"{root}/a.bin", 300_000),
            (f"{root}/sub/c.txt", 1),
        ]
        assert [file.uri for file in list_files(f"{root}/*.bin", storage)] == [f"{root}/a.bin"]
        assert list_files(f"{root}/nothing", storage) == []
        server.requests.clear()
        assert read_ranges(f"{root}/a.bin", ranges, storage) == expected
        assert read_file(f"{root}/sub/c.txt", storage) == b"c"
        with pytest.raises(FileNotFoundError):
            read_file(f"{root}/none", storage)
        with module.open_sequential(f"{root}/a.bin", storage) as file:
            assert file.read(10) == content[:10]
            file.seek(299_000)
            assert file.read() == content[299_000:]


def test_near_ranges_are_one_request(storage: Storage, server) -> None:
    write_file("s3://bucket/a.bin", bytes(400_000), storage)
    server.requests.clear()
    read_ranges("s3://bucket/a.bin", [(n * 1_000, 600) for n in range(100)] + [(390_000, 10)], storage)
    assert len([request for request in server.requests if request[0] == "GET"]) == 2


def test_passing_faults_are_ridden_out(storage: Storage, server) -> None:
    write_file("s3://bucket/a.bin", bytes(range(256)) * 100, storage)
    generator = np.random.default_rng(0)
    server.fault = lambda number, method: 503 if generator.random() < 0.2 else None
    for _ in range(40):
        assert read_ranges("s3://bucket/a.bin", [(256, 256)], storage) == [bytes(range(256))]
    assert server.failed > 2


def test_a_lasting_fault_is_an_error_that_names_the_object(storage: Storage, server) -> None:
    write_file("s3://bucket/a.bin", b"abc", storage)
    server.fault = lambda number, method: 503
    server.requests.clear()
    with pytest.raises(StorageError, match=r"s3://bucket/a.bin: still failing after 3 tries"):
        read_ranges("s3://bucket/a.bin", [(0, 3)], storage.model_copy(update={"max_attempts": 3}))
    assert len(server.requests) == 3  # our loop is the only one that tries again


def test_nobody_listening_is_a_passing_fault_until_it_is_not() -> None:
    gone = Storage(endpoint_url="http://127.0.0.1:9", max_attempts=2, timeout_seconds=1)
    with pytest.raises(StorageError, match="after 2 tries"):
        read_file("s3://bucket/a.bin", gone)
    assert is_passing(TimeoutError())
    assert not is_passing(ValueError())


def test_denied_access_is_an_input_error(storage: Storage, server) -> None:
    server.fault = lambda number, method: 403
    with pytest.raises((InputError, StorageError)):
        read_file("s3://bucket/a.bin", storage)


def test_a_source_on_s3_from_rows_to_samples(tmp_path: Path, storage: Storage, server) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)).save(buffer, "JPEG")
    rows = [{"id": f"r{n}", "image": "pictures/a.jpg" if n != 3 else "../a.jpg", "text": f"caption {n}"} for n in range(8)]
    rows[5]["image"] = "pictures/none.jpg"
    write_file("s3://bucket/in/rows.jsonl", "\n".join(map(json.dumps, rows)).encode(), storage)
    write_file("s3://bucket/in/pictures/a.jpg", buffer.getvalue(), storage)
    tokenizer = train_tokenizer(["caption"], 320, tmp_path / "tokenizer", FAMILY)
    source = Source(uri="s3://bucket/in")
    data = Data(sources={"s": source}, storage=storage)
    generator = np.random.default_rng(1)
    server.fault = lambda number, method: 503 if generator.random() < 0.15 else None
    report = ingest_source("s", source, data, "s3://bucket/out")
    assert report.refused == {"unsafe_path": 1, "missing_image": 1}
    index = load_index(build_index("s", source, report, tokenizer, FAMILY, storage=storage), FAMILY, storage=storage)
    assert [str(name) for name in index.ids] == ["r0", "r1", "r2", "r4", "r6", "r7"]
    for row in range(len(index)):
        assert read_sample(index, row)[1] == [buffer.getvalue()]
    assert server.failed > 0
    server.fault = None
    server.requests.clear()
    assert len(read_located([index.location(row) for row in range(6)])) == 6
    assert len(server.requests) == 1  # neighbours in one shard: one request
    in_place = Source(uri="s3://bucket/out/s/*/shards/*.tar")
    again = ingest_source("t", in_place, data, "s3://bucket/out")
    found = load_index(build_index("t", in_place, again, tokenizer, FAMILY, storage=storage), FAMILY, storage=storage)
    assert list(found.ids) == list(index.ids)
    write_file(found.shards[0], read_file(found.shards[0], storage)[:3000], storage)
    assert isinstance(read_located([found.location(5)])[0], DamagedData)
