"""Fixtures that every test may use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real image-text rows beside the checkout; absent on most machines."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not (folder / "captions.jsonl").is_file():
        pytest.skip("no folder of real image-text data (shared/data) beside the checkout")
    return folder


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory):
    """stored_run.Machines around one empty bucket."""
    from stored_run import machines_and_bucket

    with machines_and_bucket(tmp_path_factory.mktemp("machines")) as made:
        yield made


@pytest.fixture
def run(request: pytest.FixtureRequest, machines: Any) -> Iterator[str]:
    """The URI of a run of the test's own, in the bucket of `machines`, whose server is sound again afterwards."""
    from stored_run import BUCKET

    yield f"s3://{BUCKET}/{request.node.name}"
    machines.server.fault, machines.server.ignored = None, ()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that turns 40 times faster, and storage faults that are tried again at once."""
    from terrace.storage import follower, s3

    s3._served.clear()
    for name in ("SYNC_SECONDS", "IDLE_SECONDS", "LARGEST_WAIT_SECONDS"):
        monkeypatch.setattr(follower, name, getattr(follower, name) / 40)
    monkeypatch.setattr(s3, "BACKOFF_BASE_SECONDS", 0.001)
