"""Rendering of `k8s/` where no kubectl is at hand, and what must hold between rendered objects.

The renderer follows kustomize for what `k8s/` uses (kubectl.docs.kubernetes.io/references/kustomize/kustomization): `resources`,
`images`, `patches` with `$patch: delete`, and `namespace`: it is set on namespaced objects, and a subject follows its
ServiceAccount only if both had the same namespace, or none, before. A test compares it with kubectl's own.
"""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast on the CRD
CLUSTER_WIDE = {"Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "Topology", "ResourceFlavor", "ClusterQueue",
                "WorkloadPriorityClass"}  # fmt: skip
TRAINING = {"app.kubernetes.io/name": "terrace", "app.kubernetes.io/component": "head"}  # pods that the operator makes later


def kubectl() -> str | None:
    return shutil.which("kubectl")


def render(folder: Path) -> list[Manifest]:
    """The objects of a kustomization, by kubectl where it is at hand."""
    return copy.deepcopy(_rendered(folder))


@functools.cache
def _rendered(folder: Path) -> list[Manifest]:
    return by_kubectl(folder) if kubectl() else by_hand(folder)


def by_kubectl(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [body for body in yaml.load_all(done.stdout, Loader=LOADER) if body]


def by_hand(folder: Path) -> list[Manifest]:
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(settings) - {"apiVersion", "kind", "resources", "namespace", "images", "patches"}
    assert not unknown, f"{folder}: this renderer knows no {unknown}"
    bodies: list[Manifest] = []
    for entry in settings["resources"]:
        path = folder / entry
        bodies += by_hand(path) if path.is_dir() else [body for body in yaml.load_all(path.read_text(), Loader=LOADER) if body]
    bodies = [body for body in copy.deepcopy(bodies) if not any(_deletes(patch, body) for patch in settings.get("patches", ()))]
    if namespace := settings.get("namespace"):
        _set_namespace(bodies, namespace)
    for image in settings.get("images", ()):
        for container in (container for body in bodies for container in containers(body)):
            if container["image"].split(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return bodies


def _deletes(patch: Manifest, body: Manifest) -> bool:
    content = yaml.safe_load(patch["patch"])
    assert content.get("$patch") == "delete", "this renderer knows only patches that delete"
    target = patch["target"]
    return target["kind"] == body["kind"] and target.get("name", body["metadata"]["name"]) == body["metadata"]["name"]


def _set_namespace(bodies: list[Manifest], namespace: str) -> None:
    accounts = {(body["metadata"]["name"], body["metadata"].get("namespace")) for body in bodies if body["kind"] == "ServiceAccount"}
    for body in bodies:
        for subject in body.get("subjects", ()):
            if subject["kind"] == "ServiceAccount" and (subject["name"], subject.get("namespace")) in accounts:
                subject["namespace"] = namespace
    for body in bodies:
        if body["kind"] not in CLUSTER_WIDE:
            body["metadata"]["namespace"] = namespace


def containers(body: Manifest) -> list[Manifest]:
    return (((body.get("spec") or {}).get("template") or {}).get("spec") or {}).get("containers") or []


# ---------------------------------------------------------------- references between rendered objects


def reference_problems(bodies: list[Manifest]) -> list[str]:
    """Everything that points to nothing, or to something of another namespace."""
    known = {(body["kind"], body["metadata"].get("namespace"), body["metadata"]["name"]) for body in bodies}
    return [f"{body['kind']} {body['metadata']['name']}: {text}" for body in bodies for text in _problems(body, bodies, known)]


def _problems(body: Manifest, bodies: list[Manifest], known: set[tuple[str, str | None, str]]) -> Iterator[str]:
    kind, namespace = body["kind"], body["metadata"].get("namespace")
    namespaces = {other["metadata"].get("namespace") for other in bodies if other["kind"] not in CLUSTER_WIDE}
    if kind not in CLUSTER_WIDE and (namespace is None or len(namespaces) > 1):
        yield f"namespace {namespace} among {sorted(map(str, namespaces))}"
    if kind == "Namespace" and namespaces and body["metadata"]["name"] not in namespaces:
        yield f"nothing is in it: {sorted(map(str, namespaces))}"
    if kind in ("RoleBinding", "ClusterRoleBinding"):
        reference = body["roleRef"]
        if (reference["kind"], None if reference["kind"] == "ClusterRole" else namespace, reference["name"]) not in known:
            yield f"roleRef {reference['kind']} {reference['name']} does not exist"
        for subject in body["subjects"]:
            if subject["kind"] == "ServiceAccount" and ("ServiceAccount", subject.get("namespace"), subject["name"]) not in known:
                yield f"subject {subject.get('namespace')}/{subject['name']} does not exist"
    if kind in ("Deployment", "StatefulSet"):
        yield from _workload(body, known)
    if kind == "Service":
        pods = [pod for pod in _pods(bodies) if _selects(body["spec"]["selector"], pod["metadata"]["labels"])]
        names = {port.get("name") for pod in pods for container in pod["spec"]["containers"] for port in container.get("ports", ())}
        if not pods:
            yield "its selector matches no pod"
        for port in body["spec"]["ports"]:
            if isinstance(port.get("targetPort"), str) and port["targetPort"] not in names:
                yield f"targetPort {port['targetPort']} is no port of its pods"
    if kind in ("PodDisruptionBudget", "NetworkPolicy"):
        selector = body["spec"]["podSelector" if kind == "NetworkPolicy" else "selector"].get("matchLabels", {})
        labels = [pod["metadata"]["labels"] for pod in _pods(bodies)] + [TRAINING]
        if not any(_selects(selector, found) for found in labels):
            yield f"its selector {selector} matches no pod"


def _workload(body: Manifest, known: set[tuple[str, str | None, str]]) -> Iterator[str]:
    namespace, spec = body["metadata"].get("namespace"), body["spec"]
    pod = spec["template"]
    if not _selects(spec["selector"]["matchLabels"], pod["metadata"]["labels"]):
        yield "its selector does not match its own pods"
    account = pod["spec"].get("serviceAccountName", "default")
    if account != "default" and ("ServiceAccount", namespace, account) not in known:
        yield f"ServiceAccount {namespace}/{account} does not exist"
    if body["kind"] == "StatefulSet" and ("Service", namespace, spec["serviceName"]) not in known:
        yield f"Service {namespace}/{spec['serviceName']} does not exist"
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())}
    volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
    for volume in pod["spec"].get("volumes", ()):
        for source, key, other in (("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"), ("configMap", "name", "ConfigMap")):
            if source in volume and (other, namespace, volume[source][key]) not in known:
                yield f"{other} {namespace}/{volume[source][key]} does not exist"
    for container in pod["spec"]["containers"]:
        ports = {port.get("name") for port in container.get("ports", ())}
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                yield f"volume {mount['name']} does not exist"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            for check in ("httpGet", "tcpSocket"):
                port = (container.get(probe) or {}).get(check, {}).get("port")
                if isinstance(port, str) and port not in ports:
                    yield f"{probe}: port {port} does not exist"


def _pods(bodies: list[Manifest]) -> list[Manifest]:
    return [body["spec"]["template"] for body in bodies if containers(body)]


def _selects(selector: Manifest, labels: Manifest) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())
