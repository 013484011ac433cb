"""One harness for two clusters: the fake one in this process, and a real one named by KUBECONFIG. Tests see only the API."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_world import ROOT, condition, install_operator, operator_objects, summary, tiny_curriculum

from terrace.cluster.api import KINDS, Api, ApiError, Refused
from terrace.cluster.credentials import connect
from terrace.cluster.manifests import LABEL_CURRICULUM

Manifest = dict[str, Any]
HERE = Path(__file__).resolve().parent


class Harness:
    """An operator process on a cluster, and what tests do to both."""

    real = False
    stall_seconds = 30  # of silence until an attempt counts as stalled
    lease_seconds = 1.0  # so that a new operator need not wait for a killed one's
    patience = 30.0  # seconds until a test gives up

    def __init__(self, api: Api, namespace: str, admin: Path, operator: Path, folder: Path) -> None:
        """`admin` and `operator` are kubeconfigs: the tests' own, and that of the operator's ServiceAccount."""
        self.api, self.namespace, self.folder = api, namespace, folder
        self.environment = {**os.environ, "KUBECONFIG": str(admin)}
        self.operator_environment = {**os.environ, "KUBECONFIG": str(operator), "PYTHONPATH": f"{ROOT}/platform:{ROOT}/operators"}
        self.operator: subprocess.Popen | None = None
        self.queue = {"name": "training"}
        self.silent = ""
        self.starts = 0

    # ------------------------------------------------------------ the operator

    def start(self) -> None:
        self.starts += 1
        log = (self.folder / f"operator-{self.starts}.log").open("w")
        command = [sys.executable, "-m", "terrace_operator", "--namespace", self.namespace, "--port", "0"]
        command += ["--lease-seconds", str(self.lease_seconds)]
        self.operator = subprocess.Popen(command, env=self.operator_environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """kill -9: no handler runs, no lease is given back."""
        assert self.operator is not None
        self.operator.send_signal(signal.SIGKILL)
        self.operator.wait(10)

    def stop(self) -> None:
        if self.operator is not None and self.operator.poll() is None:
            self.operator.terminate()
            try:
                self.operator.wait(20)
            except subprocess.TimeoutExpired:
                self.operator.kill()

    # ------------------------------------------------------------ curricula

    def create(self, name: str, **values: Any) -> str:
        """A Curriculum with a name of its own in this cluster."""
        name = f"{name}-{uuid.uuid4().hex[:4]}"
        body = self.adapt(tiny_curriculum(name, **values))
        self.api.create(body)
        return name

    def adapt(self, body: Manifest) -> Manifest:
        return body

    def edit(self, name: str, **spec: Any) -> None:
        self.api.patch("Curriculum", name, {"spec": spec})

    def status(self, name: str) -> Manifest:
        return (self.api.get("Curriculum", name) or {}).get("status") or {}

    def until(self, name: str, test: Any, what: str = "", patience: float = 0.0) -> Manifest:
        """Wait until `test(status)` holds; `test` may be the name of a phase."""
        wanted = (lambda status: status.get("phase") == test) if isinstance(test, str) else test
        patience = max(patience, self.patience)
        end = time.monotonic() + patience
        status: Manifest = {}
        while time.monotonic() < end:
            assert self.operator is None or self.operator.poll() is None, "the operator has ended: " + self.log()
            status = self.status(name)
            if status and wanted(status):
                return status
            time.sleep(0.05 if not self.real else 1.0)
        pytest.fail(f"{name}: not {what or test} after {patience:g} s: {json.dumps(summary(status))}\n{self.log()}")

    def log(self, characters: int = 3000) -> str:
        return (self.folder / f"operator-{self.starts}.log").read_text()[-characters:]

    def read(self, path: str) -> str:
        """What the operator's own port answers."""
        started = next(line for line in self.log(10**6).splitlines() if "operator starts" in line)
        port = re.search(r"port (\d+)", json.loads(started)["message"]).group(1)
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).read().decode()

    def metrics(self) -> str:
        return self.read("/metrics")

    def children(self, name: str) -> dict[str, list[str]]:
        selector = f"{LABEL_CURRICULUM}={name}"
        kinds = ("RayJob", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "PodDisruptionBudget", "Pod")
        found = {kind: sorted(body["metadata"]["name"] for body in self.api.list(kind, selector)) for kind in kinds}
        return {kind: names for kind, names in found.items() if names}

    def kubectl(self, *words: str) -> str:
        return self.kubectl_as_is("--namespace", self.namespace, *words)

    def kubectl_as_is(self, *words: str) -> str:
        done = subprocess.run(["kubectl", *words], env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # ------------------------------------------------------------ the queue

    def hold_queue(self) -> None:
        """Admit nothing more, and take the quota back from what has it."""
        raise NotImplementedError

    def open_queue(self) -> None:
        raise NotImplementedError

    def narrow_queue(self) -> None:
        """Quota for one curriculum at a time; of two priority classes, the higher preempts the lower."""
        raise NotImplementedError

    # ------------------------------------------------------------ faults

    def kill_node(self, name: str) -> None:
        """The node of an attempt's worker pod dies hard: nothing of it moves any more."""
        raise NotImplementedError

    def dry_run(self, body: Manifest) -> None:
        """Refused where the API server would refuse it, under strict field validation; nothing is written."""
        kind = KINDS[body["kind"]]
        url = kind.path(self.namespace) + "?dryRun=All&fieldValidation=Strict"
        response = self.api._send("POST", url, body, "application/json", False)
        if response.status >= 300:
            raise Refused(json.loads(response.data).get("message", ""), response.status)


def connected(kubeconfig: Path, namespace: str | None = None) -> Api:
    """A connection under these credentials, whatever this process's own environment says."""
    before = os.environ.get("KUBECONFIG")
    os.environ["KUBECONFIG"] = str(kubeconfig)
    try:
        return connect(namespace)
    finally:
        os.environ.pop("KUBECONFIG")
        if before is not None:
            os.environ["KUBECONFIG"] = before


class FakeHarness(Harness):
    """The operator under the token of its ServiceAccount, whose rights are those of the files under k8s/operator."""

    def __init__(self, server: Any, folder: Path) -> None:
        admin, operator = folder / "admin.yaml", folder / "operator.yaml"
        admin.write_text(server.kubeconfig())
        install_operator(server.store)
        operator.write_text(server.kubeconfig(token=server.access.token_for(server.store.namespace, "terrace-operator")))
        super().__init__(connected(admin), server.store.namespace, admin, operator, folder)
        self.server = server

    def hold_queue(self) -> None:
        with self.server.store.lock:
            self.server.cluster.quota = 0
            for name, job in list(self.server.store.objects.get("RayJob", {}).items()):
                queued = "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})
                if queued and not job["spec"].get("suspend"):
                    self.server.cluster.preempt(name)

    def open_queue(self) -> None:
        self.server.cluster.quota = None

    def narrow_queue(self) -> None:
        self.server.cluster.quota = 1
        self.server.cluster.priorities = {f"{self.namespace}-low": 1, f"{self.namespace}-high": 2}

    def kill_node(self, name: str) -> None:
        self.server.cluster.dead.add(name)


class RealHarness(Harness):
    """A namespace of its own on the cluster of KUBECONFIG, under PodSecurity `restricted`; removed afterwards."""

    real = True
    patience = 900.0
    stall_seconds = 120

    def __init__(self, folder: Path) -> None:
        namespace = f"terrace-test-{uuid.uuid4().hex[:6]}"
        operator = folder / "operator.yaml"
        super().__init__(connect(namespace), namespace, Path(os.environ["KUBECONFIG"]), operator, folder)
        self.image = os.environ.get("TERRACE_TEST_IMAGE", "rayproject/ray:2.60.0-py311")
        self.ray_version = os.environ.get("TERRACE_TEST_RAY_VERSION", "2.60.0")
        self._apply(yaml.safe_load((ROOT / "k8s/crds/curricula.yaml").read_text()))
        self._apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": {
            "pod-security.kubernetes.io/enforce": "restricted"}}})  # fmt: skip
        self.kubectl("wait", "--for=condition=Established", "crd/curricula.terrace.dev", "--timeout=60s")
        self._apply(*operator_objects(namespace))
        operator.write_text(yaml.safe_dump(self._config_of("terrace-operator")))
        self._queues("None")

    def _config_of(self, account: str) -> Manifest:
        """A kubeconfig of this cluster under a token of a ServiceAccount, good for a day."""
        token = self.kubectl("create", "token", account, "--duration=24h").strip()
        shown = yaml.safe_load(self.kubectl("config", "view", "--raw", "--minify", "--flatten"))
        shown["users"] = [{"name": account, "user": {"token": token}}]
        shown["contexts"][0]["context"] |= {"user": account, "namespace": self.namespace}
        return shown

    def _apply(self, *bodies: Manifest) -> None:
        text = yaml.safe_dump_all(bodies)
        subprocess.run(
            ["kubectl", "apply", "--server-side", "-f", "-"], input=text, text=True, check=True, timeout=60, env=self.environment
        )

    def _queues(self, stop_policy: str, cpus: str = "64") -> None:
        """A flavor and a queue of the test's own; `stopPolicy` is how Kueue takes quota back from all of a queue."""
        name = self.namespace
        quota = [{"name": "cpu", "nominalQuota": cpus}, {"name": "memory", "nominalQuota": "256Gi"}]
        for word, value in (("low", 1), ("high", 2)):
            self._apply({"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "value": value,
                         "metadata": {"name": f"{name}-{word}"}})  # fmt: skip
        self._apply(
            {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": name}},
            {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ClusterQueue", "metadata": {"name": name}, "spec": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}, "stopPolicy": stop_policy,
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": [{"name": name, "resources": quota}]}]}},
            {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {"name": "training", "namespace": name},
             "spec": {"clusterQueue": name}},
        )  # fmt: skip

    def adapt(self, body: Manifest) -> Manifest:
        """The stand-in program in an ordinary Ray image, in small pods, at a pace that a cluster can follow."""
        runtime = body["spec"]["runtime"]
        small = {"cpu": "1", "memory": "2Gi", "sharedMemory": "512Mi"}
        runtime |= {"image": self.image, "rayVersion": self.ray_version, "workingDir": "/tmp", "head": small, "worker": small}
        runtime["entrypoint"] = ["python", "-c", (HERE / "stand_in.py").read_text()]
        given = json.loads(runtime["env"][0]["value"])
        given["step_seconds"] = max(2.0, given.get("step_seconds", 0.0))
        runtime["env"][0]["value"] = json.dumps(given)
        return body

    def hold_queue(self) -> None:
        self._queues("HoldAndDrain")

    def open_queue(self) -> None:
        self._queues("None")

    def narrow_queue(self) -> None:
        self._queues("None", cpus="4")  # head 1, worker 1, submitter 500m: once, not twice

    def kill_node(self, name: str) -> None:
        """By the command in TERRACE_TEST_KILL_NODE, called with the node's name: only who made the cluster knows how."""
        command = os.environ.get("TERRACE_TEST_KILL_NODE")
        if not command:
            pytest.skip("TERRACE_TEST_KILL_NODE is not set: the command that takes a node down")
        selector = f"ray.io/originated-from-cr-name={name},app.kubernetes.io/component=worker"
        node = self.kubectl("get", "pods", "-l", selector, "-o", "jsonpath={.items[0].spec.nodeName}")
        subprocess.run([*command.split(), node], check=True, timeout=300)

    def remove(self) -> None:
        words = ["kubectl", "delete", "--ignore-not-found", "--wait=false"]
        kinds = [("namespace", self.namespace), ("clusterqueue", self.namespace), ("resourceflavor", self.namespace)]
        kinds += [("workloadpriorityclass", f"{self.namespace}-{word}") for word in ("low", "high")]
        for kind, name in kinds:
            subprocess.run([*words, kind, name], env=self.environment, timeout=120, check=False)


def is_gone(harness: Harness, name: str) -> bool:
    try:
        return harness.api.get("Curriculum", name) is None
    except ApiError:
        return False


__all__ = ["FakeHarness", "Harness", "RealHarness", "condition", "is_gone"]
