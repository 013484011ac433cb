"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real image-text rows beside the checkout; absent on most machines."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not (folder / "captions.jsonl").is_file():
        pytest.skip("no folder of real image-text data (shared/data) beside the checkout")
    return folder
