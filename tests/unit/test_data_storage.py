"""Local and S3 storage: the same answers, ranges read together, passing faults ridden out, lasting ones named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from botocore.exceptions import ClientError
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
from terrace.storage import s3 as s3_module
from terrace.storage.faults import StorageError, is_passing
from terrace.storage.files import list_files, merge_ranges, read_file, read_ranges, write_file
from terrace.storage.s3 import s3

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
    monkeypatch.setattr(s3_module, "BACKOFF_BASE_SECONDS", 0.01)
    monkeypatch.setattr(s3_module, "BACKOFF_CAP_SECONDS", 0.05)
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


def s3_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def test_faults_that_pass_and_faults_that_do_not() -> None:
    for error in (
        TimeoutError(), ConnectionResetError(), OSError(16, "busy"), s3_error("SlowDown", 200), s3_error("Unheard", 507),
        s3_error("Unheard", 500), s3_error("Unheard", 429),
    ):  # fmt: skip
        assert is_passing(error), error
        outer = RuntimeError("in between")
        outer.__cause__ = error
        assert is_passing(outer), error
    for error in (ValueError(), OSError(2, "none"), s3_error("InvalidArgument", 400), s3_error("AccessDenied", 403), None):
        assert not is_passing(error), error


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, "AccessDenied"), "access denied .*check the credentials"),
        ((400, "ExpiredToken"), "access denied .*check the credentials"),
        ((403, "SignatureDoesNotMatch"), "access denied .*check the credentials"),
        ((404, "NoSuchBucket"), "there is no bucket 'bucket' at .*make it first"),
    ],
)
def test_what_the_storage_refuses_is_said_at_once_or_waited_for_once_it_was_allowed(storage: Storage, server, answer, words: str) -> None:
    refuse = lambda number, method: answer  # noqa: E731
    for request in (lambda: read_ranges("s3://bucket/a.bin", [(0, 3)], storage), lambda: write_file("s3://bucket/a.bin", b"x", storage)):
        server.fault = refuse
        server.requests.clear()
        s3_module._served.clear()
        with pytest.raises(InputError, match=f"s3://bucket/a.bin: {words}"):
            request()
        assert len(server.requests) <= 2
        server.fault = None
        write_file("s3://bucket/a.bin", b"abc", storage)
        request()
        # The same place has served this process: a token has run out, or a gateway starts.
        server.requests.clear()
        server.fault = lambda number, method: answer if len(server.requests) < 4 else None
        request()
        server.fault = refuse
        with pytest.raises(StorageError, match=r"still failing after 8 tries"):
            request()
        # A process that comes after one that was let in: it does not take the storage's bad minute for a mistake.
        s3_module._served.clear()
        s3_module.admitted("s3://bucket/a.bin", storage)
        server.requests.clear()
        server.fault = lambda number, method: answer if len(server.requests) < 4 else None
        request()


def test_new_credentials_are_read_when_the_old_ones_are_refused(storage: Storage, server, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file("s3://bucket/a.bin", b"abc", storage)
    old = s3(storage)
    monkeypatch.setattr(s3_module, "OPEN_ANEW_SECONDS", 0.0)
    server.fault = lambda number, method: (403, "AccessDenied")
    with pytest.raises(StorageError):
        write_file("s3://bucket/a.bin", b"abc", storage)
    assert s3(storage) is not old, "the chain of credentials is asked anew"


def test_without_credentials_the_error_says_where_they_may_stand(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in s3_server.ACCESS:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_module._filesystem.cache_clear()
    s3_module._served.clear()
    with pytest.raises(InputError, match=r"s3://bucket/a.bin: no credentials for S3 .*AWS_ACCESS_KEY_ID") as raised:
        read_file("s3://bucket/a.bin", storage)
    assert raised.value.exit_status == 2
    s3_module._filesystem.cache_clear()


def test_a_storage_that_does_not_answer_is_named_before_the_last_try(storage: Storage, server, caplog: pytest.LogCaptureFixture) -> None:
    server.fault = lambda number, method: 503
    with pytest.raises(StorageError):
        read_file("s3://bucket/a.bin", storage)
    warned = [record.message.split(" (")[0] for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["s3://bucket/a.bin: tried 3 times, going on up to 8"]


def test_names_with_the_marks_of_a_glob_are_found_as_they_are(tmp_path: Path, storage: Storage) -> None:
    for root in (str(tmp_path), "s3://bucket/odd"):
        for folder in ("brackets[1]", "star*", "what?"):
            write_file(f"{root}/{folder}/a b+é.txt", b"1", storage)
            for name in (f"{root}/{folder}", f"{root}/{folder}/a b+é.txt"):
                assert [file.uri for file in list_files(name, storage)] == [f"{root}/{folder}/a b+é.txt"]
        assert len(list_files(f"{root}/*/*.txt", storage)) == 3


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
