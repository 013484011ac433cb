"""These tests need vllm, which `make test-vllm` installs in an environment of its own; elsewhere they are skipped."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before anything imports vllm: no compiler and no warm-up, nothing from the network, no line per step.
for name, value in {
    "VLLM_CPU_CI_ENV": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, reason = Path(__file__).parent, why_not()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(1200))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def why_not() -> str:
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed here; `make test-vllm` runs this in an environment that has it"
    from vllm.platforms import current_platform

    return "" if current_platform.device_type == "cpu" else "written for the vllm of CPUs (vllm-cpu)"


@pytest.fixture
def in_this_process(monkeypatch):
    """vLLM's engine core beside the test: half a minute less than in a process of its own."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def in_its_own_process(monkeypatch):
    """vLLM's engine core as it runs beside training."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
