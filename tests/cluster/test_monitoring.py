"""Gauges, alerts and the dashboard: every metric that an alert or a panel names is one that the operator serves."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from cluster_world import ROOT, tiny_curriculum, tiny_stage

from terrace.cluster.ray_metrics import GAUGES, LABELS
from terrace_operator.gauges import HELP, samples
from terrace_operator.metrics import Metrics

FOLDER = ROOT / "k8s/overlays/monitoring"


def gauges(bench):
    found = {}
    for name, labels, value in samples(list(bench.store.objects["Curriculum"].values()), bench.clock.now):
        assert name in HELP
        found[name, *(labels[key] for key in sorted(set(labels) - {"curriculum", "stage"}))] = value
    return found


def served():
    """Names in the text of /metrics, of an operator with something of everything."""
    metrics = Metrics()
    metrics.show(list)
    metrics.on_call("GET", "RayJob", 200)
    metrics.count_phases([])
    return {line.split("{")[0].split(" ")[0] for line in metrics.text().decode().splitlines() if not line.startswith("#")} | set(HELP)


def expressions():
    rules = [body for body in yaml.safe_load_all((FOLDER / "monitoring.yaml").read_text()) if body["kind"] == "PrometheusRule"]
    alerts = [rule["expr"] for body in rules for group in body["spec"]["groups"] for rule in group["rules"]]
    dashboard = json.loads(yaml.safe_load((FOLDER / "dashboard.yaml").read_text())["data"]["terrace.json"])
    return alerts + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_every_metric_that_is_asked_for_is_served():
    names = {name for text in expressions() for name in re.findall(r"terrace_[a-z_]+", text)}
    assert len(names) > 12
    assert names - served() - {"terrace_events_total"} == set()  # a counter with labels shows when it has counted


def test_every_figure_of_a_run_that_is_drawn_is_one_that_its_workers_tell():
    dashboard = json.loads(yaml.safe_load((FOLDER / "dashboard.yaml").read_text())["data"]["terrace-training.json"])
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for text in asked for name in re.findall(r"ray_(terrace_[a-z_]+)", text)}
    assert names == set(GAUGES)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            [name] = re.findall(r"ray_(terrace_[a-z_]+)", target["expr"])
            told = {"run", "stage", LABELS[name]} if name in LABELS else {"run", "stage"}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == told, f"{target}: lines that differ have names that differ"


def test_legends_name_labels_that_what_is_drawn_has(bench):
    """Of the operator's dashboard: those of the sum, or those of the gauge itself."""
    gauged = drawn(bench)
    labels = {name: {key for found, told, _ in gauged if found == name for key in told} for name in HELP}
    dashboard = json.loads(yaml.safe_load((FOLDER / "dashboard.yaml").read_text())["data"]["terrace.json"])
    seen = 0
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            summed = re.search(r"by \(([\w, ]+)\)", target["expr"])
            name = re.search(r"terrace_[a-z_]+", target["expr"])[0]
            has = set(summed[1].split(", ")) if summed else labels.get(name, set())
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert named <= has, (panel["title"], named, has)
            seen += len(named)
    assert seen > 10


def drawn(bench):
    """Samples of every gauge: of a running curriculum with limits, and of one that waits."""
    stages = [tiny_stage("warmup", resources={"workers": 2, "gpus_per_worker": 1})]
    bench.store.create(tiny_curriculum(stages=stages, behaviour={"steps": 60, "step_seconds": 100}, limits={"gpuHours": 10},
                                       failurePolicy={"maxRestarts": 3}))  # fmt: skip
    bench.run(650, step=5)
    running = list(samples(list(bench.store.objects["Curriculum"].values()), bench.clock.now))
    bench.cluster.quota = 0
    bench.store.create(tiny_curriculum("waiting", queue={"name": "training"}))
    bench.run(300, step=5)
    return [*running, *samples(list(bench.store.objects["Curriculum"].values()), bench.clock.now)]


def test_gauges_say_how_a_running_curriculum_stands(bench):
    stages = [tiny_stage("warmup", resources={"workers": 2, "gpus_per_worker": 1})]
    bench.store.create(tiny_curriculum(stages=stages, behaviour={"steps": 60, "step_seconds": 100}, limits={"gpuHours": 10},
                                       failurePolicy={"maxRestarts": 3}))  # fmt: skip
    bench.run(650, step=5)
    found = gauges(bench)
    assert found["terrace_curriculum_phase", "Running"] == 1
    assert found["terrace_curriculum_gpus",] == 2
    assert found["terrace_curriculum_step",] == pytest.approx(6, abs=1)
    assert found["terrace_curriculum_total_steps",] == 60
    assert found["terrace_curriculum_report_age_seconds",] <= 110
    assert found["terrace_curriculum_checkpoint_age_seconds",] <= 110
    assert found["terrace_curriculum_restarts", "program"] == 0
    assert found["terrace_curriculum_restarts_left", "program"] == 3
    assert 0 < found["terrace_curriculum_limit_used_ratio", "gpuHours"] < 0.1


def test_gauges_of_waiting_and_of_silence_grow(bench):
    bench.cluster.quota = 0
    bench.store.create(tiny_curriculum(queue={"name": "training"}))
    bench.run(300, step=5)
    assert gauges(bench)["terrace_curriculum_queued_seconds",] >= 290
    bench.cluster.quota = None
    bench.run_until("Succeeded")
    assert gauges(bench) == {}  # an ended one is on no dashboard
    bench.store.create(tiny_curriculum("silent", behaviour={"hang": True, "steps": 9}))
    bench.run(600, step=5)
    found = gauges(bench)
    assert found["terrace_curriculum_report_age_seconds",] >= 580
    assert found["terrace_curriculum_checkpoint_age_seconds",] >= 580
