"""KubeRay, Kueue and the kubelet, played on a real API server that has their kinds and no nodes (an etcd, an API server and a controller
manager are enough).

The server's validation, defaulting, rights, watches and garbage collection are real; what moves RayJobs, RayClusters, Workloads and
Pods is `fake/kuberay.py`, the same that the fake server has. Programs write their reports under the token of the trainer's own
ServiceAccount, so the rights of the pods are the server's word too.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from fake.kuberay import Cluster
from harness import RealHarness, connected

from terrace.cluster.api import KINDS, AlreadyExists, Api, ApiError, Conflict, Kind

Manifest = dict[str, Any]
MOVED = ("RayJob", "RayCluster", "Pod", "Workload", "ConfigMap")
KINDS.setdefault("RayCluster", Kind("ray.io/v1", "rayclusters"))  # the operator itself has no business with it


class ApiStore:
    """What `Cluster` needs of a store, over an API: a mirror that each `refresh` reads anew, and writes that go to the server."""

    def __init__(self, api: Api, trainer: Callable[[str], Api]) -> None:
        self.api, self.trainer, self.clock = api, trainer, time.time
        self.lock = threading.RLock()
        self.objects: dict[str, dict[str, Manifest]] = {}

    def refresh(self) -> None:
        for kind in MOVED:
            self.objects[kind] = {body["metadata"]["name"]: body for body in self.api.list(kind)}

    def create(self, body: Manifest) -> Manifest:
        try:
            made = self.api.create(body)
        except AlreadyExists:
            made = self.api.get(body["kind"], body["metadata"]["name"]) or body
        self.objects.setdefault(body["kind"], {})[made["metadata"]["name"]] = made
        return made

    def delete(self, kind: str, name: str, foreground: bool = False) -> None:
        self.api.delete(kind, name, foreground=foreground)

    def patch(self, kind: str, name: str, change: Manifest) -> Manifest:
        """Only reports are written so: by the program, as its own account."""
        return self._seen(kind, self.trainer(name.removesuffix("-progress")).patch(kind, name, change))

    def modify(self, kind: str, body: Manifest) -> Manifest:
        name = body["metadata"]["name"]
        known = self.objects[kind][name]
        if body["spec"] != known["spec"]:
            return self._seen(kind, self.api.patch(kind, name, {"spec": {"suspend": body["spec"]["suspend"]}}))
        for _ in range(5):
            try:
                return self._seen(kind, self.api.replace_status({**known, "status": body["status"]}))
            except Conflict:
                if (known := self.api.get(kind, name)) is None:
                    return body
        raise ApiError(f"{kind} {name} changes too fast")

    def drop_finalizer(self, body: Manifest, finalizer: str) -> None:
        left = [item for item in body["metadata"].get("finalizers", ()) if item != finalizer]
        self.api.patch(body["kind"], body["metadata"]["name"], {"metadata": {"finalizers": left}})

    def _seen(self, kind: str, body: Manifest) -> Manifest:
        self.objects[kind][body["metadata"]["name"]] = body
        return body


class PlayedHarness(RealHarness):
    patience = 60.0
    stall_seconds = 30

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tokens: dict[str, Api] = {}
        self.cluster = Cluster(ApiStore(self.api, self._trainer))
        self.cluster.priorities = {f"{self.namespace}-low": 1, f"{self.namespace}-high": 2}
        self.faults: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._play, daemon=True)
        self._thread.start()

    def _play(self) -> None:
        while not self._end.wait(0.2):
            try:
                self.cluster.store.refresh()
                self.cluster.tick(time.monotonic())
            except ApiError as error:  # a write that lost a race is made again at the next tick
                self.faults.append(str(error))

    def _trainer(self, curriculum: str) -> Api:
        """The API under a token of the curriculum's own ServiceAccount."""
        if curriculum not in self.tokens:
            kubeconfig = self.folder / f"{curriculum}.yaml"
            kubeconfig.write_text(yaml.safe_dump(self._config_of(f"{curriculum}-trainer")))
            self.tokens[curriculum] = connected(kubeconfig, self.namespace)
        return self.tokens[curriculum]

    def adapt(self, body: Manifest) -> Manifest:
        given = json.loads(body["spec"]["runtime"]["env"][0]["value"])
        body["spec"]["runtime"]["env"][0]["value"] = json.dumps({"step_seconds": 0.3} | given)
        return body

    def hold_queue(self) -> None:
        self.cluster.quota = 0
        for name, job in list(self.cluster.store.objects.get("RayJob", {}).items()):
            if "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {}) and not job["spec"].get("suspend"):
                self.cluster.preempt(name)

    def open_queue(self) -> None:
        self.cluster.quota = None

    def narrow_queue(self) -> None:
        self.cluster.quota = 1

    def kill_node(self, name: str) -> None:
        self.cluster.dead.add(name)

    def remove(self) -> None:
        self._end.set()
        self._thread.join(10)
        for pod in self.api.list("Pod"):  # nobody else would
            self.cluster.store.drop_finalizer(pod, "test/kubelet")
        super().remove()


def has_no_nodes(kubeconfig: str) -> bool:
    words = ["kubectl", "--kubeconfig", kubeconfig, "get", "nodes", "-o", "name"]
    return not subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
