"""One small local Ray for all tests of this folder."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray of two CPUs and 300 MB of objects, started once; the tests share it."""
    ray = pytest.importorskip("ray")
    started = not ray.is_initialized()
    if started:
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=300 * 2**20, log_to_driver=False)
    yield ray
    if started:
        ray.shutdown()
