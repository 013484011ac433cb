"""What of a stage's rows becomes a gauge, and that a Ray's own endpoint serves it."""

from __future__ import annotations

import re
import sys
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from waiting import eventually

from terrace.cluster.ray_metrics import GAUGES, metrics_observer, points


def test_points_of_events():
    row = {"step": 4, "loss": None, "grad_norm": 2.0, "tokens_per_second": 10, "step_seconds": 0.5, "data_wait_seconds": 0.1,
           "tasks": {"counting": {"reward": 0.25}, "boxes": {"reward": None}}}  # fmt: skip
    found = points("step", row)
    assert ("terrace_data_wait_share", "", 0.2) in found
    assert ("terrace_reward", "counting", 0.25) in found
    assert {name for name, _, _ in found} == {
        "terrace_step", "terrace_grad_norm", "terrace_tokens_per_second", "terrace_data_wait_share", "terrace_reward",
    }, "what is not a number is left as it was"  # fmt: skip
    assert points("started", {"stage": "sft", "step": 2, "total_steps": 9, "attempt": 1}) == [
        ("terrace_total_steps", "", 9.0), ("terrace_step", "", 2.0),
    ]  # fmt: skip
    assert points("evaluation", {"when": 4, "loss": {"caption": 1.5, "reward/counting": 0.5}}) == [
        ("terrace_held_out", "caption", 1.5), ("terrace_held_out", "reward/counting", 0.5),
    ]  # fmt: skip
    assert points("evaluation", {"when": "before", "loss": None}) == points("checkpoint", {"step": 1, "path": "p"}) == []
    whole = {**row, "loss": 1.0, "memory_peak_bytes": 3, "total_steps": 9}
    told = [*points("started", whole), *points("step", whole), *points("evaluation", {"loss": {"caption": 1.0}})]
    assert {name for name, _, _ in told} == set(GAUGES), "every gauge is set by something"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_serves_them(tmp_path: Path):
    """In a Ray of this process, whose node exports what its workers set."""
    import ray

    assert metrics_observer("mine", "sft") == [] or ray.is_initialized()
    package = Path(__file__).resolve().parents[2] / "platform"
    started = not ray.is_initialized()
    if started:
        paths = {"env_vars": {"PYTHONPATH": str(package)}}
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=paths)

    @ray.remote(num_cpus=0)
    class Worker:
        def tell(self) -> int:
            from terrace.cluster.ray_metrics import metrics_observer

            self.observers = metrics_observer("mine", "01-sft")
            for observe in self.observers:
                observe("step", {"step": 7, "loss": 0.5, "tasks": {"counting": {"reward": 0.25}}})
            return len(self.observers)

    try:
        worker = Worker.remote()
        assert ray.get(worker.tell.remote(), timeout=200) == 1
        port = ray.nodes()[0]["MetricsExportPort"]
        served = ""

        def there() -> bool:
            nonlocal served
            served = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            return "ray_terrace_reward{" in served

        assert eventually(there, 90), served[-2000:]
        lines = {line.partition("{")[0]: line for line in served.splitlines() if line.startswith("ray_terrace_")}
        assert lines["ray_terrace_loss"].endswith(" 0.5")
        assert lines["ray_terrace_step"].endswith(" 7.0")
        labels = dict(re.findall(r'(\w+)="([^"]*)"', lines["ray_terrace_reward"]))
        assert (labels["run"], labels["stage"], labels["task"]) == ("mine", "01-sft", "counting")
    finally:
        if started:
            ray.shutdown()
