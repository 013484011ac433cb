"""Fixtures of the cluster tests: the fake cluster driven in this process, and specs to put into it."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for folder in (HERE, ROOT / "operators"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fake.kuberay import Cluster  # noqa: E402
from fake.store import Store, install_crd  # noqa: E402
from kustomize import LOADER  # noqa: E402

Manifest = dict[str, Any]


def tiny_stage(name: str, **values: Any) -> Manifest:
    return {
        "name": name, "train": {"projector": {"lr": 0.001}}, "mixture": {"weights": {"captions": 1.0}}, 
        "sequence_length": 256, "pixels": {"max": 50176}, "budget": {"steps": 4}, "precision": "fp32", "batch": {"packs": 4},
    } | values  # fmt: skip


def tiny_curriculum(name: str = "tiny", stages: list[Manifest] | None = None, behaviour: Manifest | None = None,
                    stage_order: str = "sequence", **spec: Any) -> Manifest:  # fmt: skip
    """A Curriculum that is right; `behaviour` is what the stand-in program does."""
    stages = stages or [tiny_stage("warmup"), tiny_stage("align")]
    return {
        "apiVersion": "terrace.dev/v1alpha1", "kind": "Curriculum", "metadata": {"name": name},
        "spec": {
            "recipe": {
                "name": name,
                "model": {"pretrained": "s3://bucket/model"},
                "tokenizer": {"path": "s3://bucket/tokenizer"},
                "data": {"sources": {"captions": {"uri": "s3://bucket/captions/", "holdout_samples": 8}}},
                "stages": stages,
            } | ({"stage_order": stage_order} if stage_order != "sequence" else {}),
            "runtime": {
                "image": "registry.example/terrace:test", "head": {"cpu": "1", "memory": "2Gi"},
                "worker": {"cpu": "2", "memory": "4Gi"},
                "env": [{"name": "STAND_IN", "value": json.dumps(behaviour or {})}],
            },
            "storage": {"uri": "s3://bucket/runs/" + name},
            "failurePolicy": {"backoffSeconds": 0.2, "backoffCapSeconds": 1.0},
        } | copy.deepcopy(spec),
    }  # fmt: skip


def operator_objects(namespace: str) -> list[Manifest]:
    """ServiceAccount, Role and RoleBinding of the operator, and the ClusterRoles for people, from the very files under k8s/."""
    found = []
    for file in ("rbac.yaml", "access.yaml"):
        for body in yaml.safe_load_all((ROOT / "k8s/operator" / file).read_text()):
            if body["kind"] != "ClusterRole":
                body["metadata"]["namespace"] = namespace
            for subject in body.get("subjects", ()):
                subject["namespace"] = namespace
            found.append(body)
    return found


def install_operator(store: Store) -> None:
    for body in operator_objects(store.namespace):
        store.create(body)


@pytest.fixture(scope="session")
def crd() -> Manifest:
    return yaml.load((ROOT / "k8s/crds/curricula.yaml").read_text(), Loader=LOADER)  # noqa: S506


class Clock:
    """Two clocks under the test's control: the wall's, which may jump, and one that only runs forward."""

    def __init__(self) -> None:
        self.now, self.forward = 1_800_000_000.0, 0.0

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.forward += seconds

    def wall(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.forward


class Bench:
    """An operator's controller on a fake cluster, with time under control. No threads, no network."""

    def __init__(self, crd: Manifest) -> None:
        from terrace_operator.controller import Controller

        self.clock = Clock()
        self.store = Store(clock=self.clock.wall)
        install_crd(self.store, crd)
        self.cluster = Cluster(self.store)
        self.controller = Controller(self.store, clock=self.clock.wall, monotonic=self.clock.monotonic)
        self.seen = 0

    def restart(self) -> None:
        """kill -9 of the operator: everything it had in memory is gone."""
        from terrace_operator.controller import Controller

        self.controller = Controller(self.store, clock=self.clock.wall, monotonic=self.clock.monotonic)
        self.controller.resync()

    def deliver(self) -> None:
        """Bring the operator's cache up to date, as its watches do."""
        for kind in ("Curriculum", "RayJob", "ConfigMap", "Workload"):
            for change in self.store.changes.get(kind, []):
                if change.version > self.seen:
                    self.controller.cache.store(kind, change.body, deleted=change.kind == "DELETED")
        self.seen = self.store.version

    def run(self, seconds: float, step: float = 0.1) -> None:
        for _ in range(round(seconds / step)):
            self.deliver()
            for name in self.controller.cache.names():
                self.controller.handle(name)
            self.cluster.tick(self.clock.forward)
            self.clock.advance(step)

    def run_until(self, phase: str, name: str = "tiny", seconds: float = 60.0) -> Manifest:
        for _ in range(round(seconds / 0.1)):
            self.run(0.1)
            if self.status(name).get("phase") == phase:
                return self.status(name)
        raise AssertionError(f"{name} is not {phase} after {seconds} s but {json.dumps(summary(self.status(name)))}")

    def status(self, name: str = "tiny") -> Manifest:
        body = self.store.objects.get("Curriculum", {}).get(name)
        return (body or {}).get("status") or {}

    def edit(self, name: str = "tiny", **spec: Any) -> Manifest:
        return self.store.patch("Curriculum", name, {"spec": spec})

    def jobs(self) -> list[str]:
        return sorted(self.store.objects.get("RayJob", {}))

    def events(self) -> list[tuple[str, str]]:
        return [(body["reason"], body["message"]) for body in self.store.objects.get("Event", {}).values()]


def condition(status: Manifest, kind: str) -> Manifest:
    return next((item for item in status.get("conditions", ()) if item["type"] == kind), {})


def summary(status: Manifest) -> Manifest:
    progressing = condition(status, "Progressing")
    return {"phase": status.get("phase"), "stages": [(s["name"], s["phase"], s["attempt"]) for s in status.get("stages", ())],
            "reason": progressing.get("reason"), "message": progressing.get("message"),
            "accepted": condition(status, "Accepted").get("message")}  # fmt: skip


@pytest.fixture
def bench(crd: Manifest) -> Bench:
    return Bench(crd)


def build_template() -> Manifest:
    """A worker's pod template of a Curriculum that is right."""
    from terrace.cluster.cluster_schema import CurriculumSpec
    from terrace.cluster.manifests import build_rayjob

    body = tiny_curriculum()
    owner = {**body, "metadata": {**body["metadata"], "namespace": "default", "uid": "u-1"}}
    job = build_rayjob(owner, CurriculumSpec.model_validate(body["spec"]), 0, 1, "tiny-recipe-0")
    return copy.deepcopy(job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"])
