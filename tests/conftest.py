"""Fixtures that every test may use."""

from __future__ import annotations

import sys
from pathlib import Path

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
def run(request: pytest.FixtureRequest) -> str:
    """The URI of a run of the test's own, in the bucket of `machines`."""
    from stored_run import BUCKET

    return f"s3://{BUCKET}/{request.node.name}"
