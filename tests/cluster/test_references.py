"""The kustomizations: what is rendered refers to what is there, the rights go to the operator's account and to nobody else."""

from __future__ import annotations

import copy

import kubernetes_validate
import pytest
import yaml
from cluster_world import ROOT
from fake.access import Access, Ask, User
from fake.podsecurity import violations
from fake.store import Store
from kustomize import by_hand, by_kubectl, kubectl, reference_problems, render

VERSION = "1.36"
OVERLAYS = sorted(str(path.parent.relative_to(ROOT / "k8s")) for path in (ROOT / "k8s").rglob("kustomization.yaml"))
WHOLE = [".", *(name for name in OVERLAYS if name.startswith("overlays/"))]  # what people apply


def account(namespace):
    return User(f"system:serviceaccount:{namespace}:terrace-operator")


@pytest.mark.parametrize("folder", WHOLE)
def test_rendered_objects_refer_to_each_other(folder):
    assert reference_problems(render(ROOT / "k8s" / folder)) == []


@pytest.mark.parametrize("folder", WHOLE)
def test_rendered_objects_are_valid_kubernetes(folder):
    bodies = render(ROOT / "k8s" / folder)
    assert bodies
    for body in bodies:
        if body["apiVersion"].split("/")[0] in ("kueue.x-k8s.io", "monitoring.coreos.com", "apiextensions.k8s.io"):
            continue  # no published schema here; the CRD has its own tests
        kubernetes_validate.validate(body, VERSION, strict=True)
        template = body["spec"].get("template") if "spec" in body else None
        if template and "containers" in template.get("spec", {}):
            assert violations(template) == [], body["metadata"]["name"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_own_renderer_is_kustomize(folder):
    if kubectl() is None:
        pytest.skip("kubectl is not installed")

    def ordered(bodies):
        found = sorted((body["kind"], body["metadata"]["name"], body) for body in bodies)
        return [item[:2] if item[0] == "CustomResourceDefinition" else item for item in found]  # it writes 1.0 as 1

    assert ordered(by_hand(ROOT / "k8s" / folder)) == ordered(by_kubectl(ROOT / "k8s" / folder))


def allowed(bodies, namespace, who):
    store = Store(namespace=namespace)
    for body in bodies:
        if body["kind"] in ("ServiceAccount", "Role", "RoleBinding", "ClusterRole"):
            made = store.create(body)
            store.objects[body["kind"]][made["metadata"]["name"]]["metadata"]["namespace"] = body["metadata"].get("namespace")
    return Access(store).allowed(who, Ask("list", "terrace.dev", "curricula", namespace))


@pytest.mark.parametrize(("folder", "namespace"), [(".", "terrace"), ("overlays/single-namespace", "team-vision")])
def test_rights_go_to_the_operator_of_the_namespace_and_to_nobody_else(folder, namespace):
    bodies = render(ROOT / "k8s" / folder)
    assert allowed(bodies, namespace, account(namespace))
    for other in ("terrace", "team-vision", "default"):
        assert allowed(bodies, namespace, account(other)) is (other == namespace), other


def test_an_overlay_of_somebody_elses_sets_the_namespace_of_everything(tmp_path):
    """`resources: [k8s/]` and a namespace: the way in which people install into a namespace of theirs."""
    import shutil

    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    (tmp_path / "mine").mkdir()
    mine = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "mine", "resources": ["../k8s"]}
    (tmp_path / "mine/kustomization.yaml").write_text(yaml.safe_dump(mine))
    bodies = [body for body in render(tmp_path / "mine") if body["kind"] != "Namespace"]
    assert reference_problems(bodies) == []
    assert allowed(bodies, "mine", account("mine"))
    assert not allowed(bodies, "mine", account("terrace"))


def test_broken_references_are_found():
    bodies = by_hand(ROOT / "k8s")
    mlflow, s3 = by_hand(ROOT / "k8s/overlays/mlflow"), by_hand(ROOT / "k8s/overlays/s3")

    def broken(bodies, kind, change):
        wrong = copy.deepcopy(bodies)
        change(next(body for body in wrong if body["kind"] == kind))
        return "; ".join(reference_problems(wrong))

    assert "subject other/terrace-operator does not exist" in broken(
        bodies, "RoleBinding", lambda b: b["subjects"][0].update(namespace="other"))  # fmt: skip
    assert "subject None/terrace-operator" in broken(bodies, "RoleBinding", lambda b: b["subjects"][0].pop("namespace"))
    assert "roleRef Role x does not exist" in broken(bodies, "RoleBinding", lambda b: b["roleRef"].update(name="x"))
    assert "ServiceAccount terrace/x" in broken(
        bodies, "Deployment", lambda b: b["spec"]["template"]["spec"].update(serviceAccountName="x"))
    assert "own pods" in broken(bodies, "Deployment", lambda b: b["spec"]["selector"].update(matchLabels={"a": "b"}))
    assert "matches no pod" in broken(bodies, "Service", lambda b: b["spec"].update(selector={"a": "b"}))
    assert "targetPort x" in broken(bodies, "Service", lambda b: b["spec"]["ports"][0].update(targetPort="x"))
    assert "matches no pod" in broken(bodies, "PodDisruptionBudget", lambda b: b["spec"]["selector"].update(matchLabels={"a": "b"}))
    assert "matches no pod" in broken(bodies, "NetworkPolicy", lambda b: b["spec"]["podSelector"].update(matchLabels={"a": "b"}))
    assert "among" in broken(bodies, "Role", lambda b: b["metadata"].update(namespace="other"))
    assert "nothing is in it" in broken(bodies, "Namespace", lambda b: b["metadata"].update(name="other"))
    assert "PersistentVolumeClaim terrace/x" in broken(mlflow, "Deployment", lambda b: b["spec"]["template"]["spec"]["volumes"][0].update(
        persistentVolumeClaim={"claimName": "x"}))  # fmt: skip
    assert "port x does not exist" in broken(
        mlflow, "Deployment", lambda b: b["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["tcpSocket"].update(port="x"))
    assert "Service terrace/x does not exist" in broken(s3, "StatefulSet", lambda b: b["spec"].update(serviceName="x"))
