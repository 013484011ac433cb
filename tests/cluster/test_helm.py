"""The Helm chart, rendered and linted by Helm itself: the same objects as the kustomization, in the release's namespace."""

from __future__ import annotations

import json
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from cluster_world import ROOT
from fake.access import Access, Ask, User
from fake.podsecurity import violations
from fake.store import Store
from kustomize import LOADER, containers, reference_problems, render

CHART = ROOT / "k8s/helm/terrace"
EVERYTHING = {
    "image": {"repository": "registry.example/terrace-operator", "tag": "9.9"}, "imagePullSecrets": [{"name": "registry"}], "replicas": 3,
    "args": ["--log-level", "DEBUG"], "resources": {"limits": {"memory": "1Gi"}}, "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "cpu", "operator": "Exists"}], "queues": [{"name": "training", "clusterQueue": "big"}],
    "mlflow": {"enabled": True}, "s3": {"enabled": True}, "monitoring": {"enabled": True, "labels": {"release": "mine"}},
}  # fmt: skip


def helm():
    """(lint, template) by the binary, else by the library in the package helm-python-sdk (`pip install 'terrace[chart]'`)."""
    if shutil.which("helm"):

        def run(*words, values):
            done = subprocess.run(["helm", *words, "--values", "-"], input=json.dumps(values), capture_output=True, text=True, timeout=60)
            return done.returncode, done.stdout, done.stderr

        return (lambda values: run("lint", str(CHART), values=values),
                lambda values, namespace: run("template", "demo", str(CHART), "--namespace", namespace, values=values))  # fmt: skip
    library = pytest.importorskip("helm_python.chart", reason="neither helm nor helm-python-sdk is installed: pip install 'terrace[chart]'")

    def lint(values):
        found = library.lint(CHART, values)
        return len(found["errors"]), "", "; ".join(map(str, found["errors"]))

    def template(values, namespace):
        try:
            with library.Chart.load(CHART) as chart:
                made = chart.render(values=values, name="demo", namespace=namespace)
        except Exception as error:  # the library's own classes
            return 1, "", str(error)
        return 0, "\n".join(text for name, text in sorted(made.items()) if name.endswith(".yaml")), ""

    return lint, template


def rendered(values, namespace="terrace"):
    code, text, error = helm()[1](values, namespace)
    assert code == 0, error
    return [body for body in yaml.load_all(text, Loader=LOADER) if body]


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_chart_passes_lint_and_renders_valid_objects_that_refer_to_each_other(values):
    code, _, error = helm()[0](values)
    assert code == 0, error
    bodies = rendered(values, "team-vision")
    assert reference_problems(bodies) == []
    for body in bodies:
        if body["apiVersion"].split("/")[0] not in ("kueue.x-k8s.io", "monitoring.coreos.com"):
            kubernetes_validate.validate(body, "1.36", strict=True)
        if containers(body):
            assert violations(body["spec"]["template"]) == []


def test_defaults_are_the_objects_of_the_kustomization():
    def ordered(bodies):
        return sorted(((body["kind"], body["metadata"]["name"], body) for body in bodies), key=lambda item: item[:2])

    expected = [body for body in render(ROOT / "k8s") if body["kind"] not in ("Namespace", "CustomResourceDefinition")]
    for body in expected:
        for container in containers(body):
            container["imagePullPolicy"] = "IfNotPresent"
    assert ordered(rendered({})) == ordered(expected)


def test_values_reach_the_objects():
    bodies = rendered(EVERYTHING, "mine")
    operator = next(body for body in bodies if body["kind"] == "Deployment" and body["metadata"]["name"] == "terrace-operator")
    pod = operator["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (operator["spec"]["replicas"], container["image"]) == (3, "registry.example/terrace-operator:9.9")
    assert container["args"][-2:] == ["--log-level", "DEBUG"]
    assert container["resources"] == {"limits": {"memory": "1Gi"}}
    assert (pod["nodeSelector"], pod["imagePullSecrets"]) == ({"pool": "cpu"}, [{"name": "registry"}])
    queue = next(body for body in bodies if body["kind"] == "LocalQueue")
    assert (queue["metadata"]["namespace"], queue["spec"]) == ("mine", {"clusterQueue": "big"})
    mlflow = next(body for body in bodies if (body["kind"], body["metadata"]["name"]) == ("Deployment", "mlflow"))
    assert "mlflow.mine.svc" in yaml.safe_dump(mlflow)
    assert {body["metadata"]["labels"]["release"] for body in bodies if body["kind"] in ("ServiceMonitor", "PrometheusRule")} == {"mine"}
    dashboard = next(body for body in bodies if body["metadata"]["name"] == "terrace-dashboard")
    assert "{{curriculum}}" in dashboard["data"]["terrace.json"]  # Grafana's braces, not Helm's
    least = rendered({"clusterRoles": False, "networkPolicies": False})
    assert {body["kind"] for body in least} & {"ClusterRole", "NetworkPolicy"} == set()


def test_rights_are_those_of_the_releases_account():
    store = Store(namespace="mine")
    for body in rendered({}, "mine"):
        if body["kind"] in ("Role", "RoleBinding"):
            store.create(body)
    access = Access(store)
    ask = Ask("list", "terrace.dev", "curricula", "mine")
    assert access.allowed(User("system:serviceaccount:mine:terrace-operator"), ask)
    assert not access.allowed(User("system:serviceaccount:terrace:terrace-operator"), ask)


@pytest.mark.parametrize(
    "values", [{"imgae": {}}, {"replicas": 0}, {"queues": [{"name": "x"}]}, {"image": {"repository": ""}}, {"mlflow": {"enabled": "yes"}}]
)
def test_wrong_values_are_refused_by_the_schema(values):
    code, _, error = helm()[1](values, "terrace")
    assert code != 0, "accepted"
    assert next(iter(values)) in error


def test_chart_has_no_second_copy_of_anything():
    for path in [*(CHART / "files").iterdir(), *(CHART / "crds").iterdir()]:
        assert path.is_symlink(), f"{path} must be a link to the file of the kustomization"
        assert path.resolve().is_file(), path
