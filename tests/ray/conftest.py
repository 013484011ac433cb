"""One small local Ray for all tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import s3_server


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray of two CPUs and 300 MB of objects, started once; the tests share it."""
    ray = pytest.importorskip("ray")
    started = not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.ACCESS.items():
            patch.setenv(name, value)  # workers inherit it
        if started:
            ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=300 * 2**20, log_to_driver=False)
        yield ray
        if started:
            ray.shutdown()
