"""The objects of a stage attempt, and the files under k8s/: valid Kubernetes, restricted PodSecurity, least rights."""

from __future__ import annotations

import re
import subprocess

import kubernetes_validate
import pytest
import yaml
from cluster_world import ROOT, Bench, tiny_curriculum, tiny_stage
from fake.podsecurity import violations

from terrace.cluster import manifests
from terrace.cluster.cluster_schema import CurriculumSpec
from terrace.cluster.render import load_cluster, render_curriculum, to_yaml
from terrace.errors import InputError
from terrace.recipe.loading import load_recipe
from terrace_operator.absent import lacking
from terrace_operator.conditions import quota_message

VERSION = "1.36"


def owner(body):
    return {**body, "metadata": {**body["metadata"], "namespace": "default", "uid": "u-1"}}


def built(**spec):
    body = owner(tiny_curriculum(**spec))
    return manifests.build_rayjob(body, CurriculumSpec.model_validate(body["spec"]), 1, 3, "tiny-recipe-0")


def templates(job):
    cluster = job["spec"]["rayClusterSpec"]
    return {
        "head": cluster["headGroupSpec"]["template"], "worker": cluster["workerGroupSpecs"][0]["template"],
        "submitter": job["spec"]["submitterPodTemplate"],
    }  # fmt: skip


def validate(body):
    kubernetes_validate.validate(body, VERSION, strict=True)


def test_pods_of_an_attempt_are_valid_and_restricted():
    stages = [tiny_stage("warmup"), tiny_stage("align", resources={"workers": 4, "gpus_per_worker": 1})]
    storage = {
        "uri": "s3://bucket/x",
        "credentialsSecret": "s3-keys",
        "volumes": [{"claim": "corpus", "mountPath": "/corpus", "readOnly": True}],
    }
    for role, template in templates(built(stages=stages, storage=storage)).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role, **template["metadata"]}, "spec": template["spec"]}
        validate(pod)
        assert violations(pod) == [], role
        container = template["spec"]["containers"][0]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert template["spec"]["serviceAccountName"] == "tiny-trainer"
        assert template["spec"]["automountServiceAccountToken"] is (role == "head")


def test_podsecurity_check_can_fail():
    pod = {"spec": templates(built())["worker"]["spec"]}
    pod["spec"]["containers"][0]["securityContext"] = {}
    assert len(violations(pod)) >= 2


def test_rayjob_says_what_the_real_operators_need():
    job = built(queue={"name": "training", "priorityClass": "high", "topologyRequired": "rack"})
    assert job["metadata"]["name"] == "tiny-s1-3"
    assert job["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    spec = job["spec"]
    assert (spec["suspend"], spec["shutdownAfterJobFinishes"], spec["backoffLimit"]) == (True, True, 0)
    assert spec["submitterConfig"]["backoffLimit"] > 0  # its eviction does not end the attempt
    assert "clusterSelector" not in spec
    assert spec["entrypoint"] == (
        "python jobs/pretrain.py /etc/terrace/recipe.yaml --run-dir s3://bucket/runs/tiny --stage align --attempt 3"
    )
    pods = templates(job)
    assert pods["worker"]["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-required-topology": "rack"}
    for role in ("head", "submitter"):
        assert pods[role]["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-unconstrained-topology": "true"}
    for template in pods.values():
        seconds = {t["key"]: t.get("tolerationSeconds") for t in template["spec"]["tolerations"]}
        assert seconds == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}
    worker = pods["worker"]["spec"]
    wait = int(worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert wait < worker["terminationGracePeriodSeconds"]
    assert worker["terminationGracePeriodSeconds"] >= 60 + 30  # the stage's preemption grace and a margin


def test_other_schedulers_get_their_labels_and_no_suspension():
    volcano = built(queue={"name": "training", "scheduler": "volcano", "priorityClass": "high"})
    yunikorn = built(queue={"name": "root.team", "scheduler": "yunikorn"})
    for job in (volcano, yunikorn):
        assert job["spec"]["suspend"] is False
        assert not [label for label in job["metadata"]["labels"] if "kueue" in label]
    assert volcano["metadata"]["labels"].items() >= {"volcano.sh/queue-name": "training", "ray.io/priority-class-name": "high"}.items()
    expected = {"yunikorn.apache.org/queue": "root.team", "yunikorn.apache.org/app-id": yunikorn["metadata"]["name"],
                "ray.io/gang-scheduling-enabled": "true"}  # fmt: skip
    assert yunikorn["metadata"]["labels"].items() >= expected.items()
    assert quota_message(volcano, None).reason == quota_message(yunikorn, None).reason == "OtherScheduler"
    spec = CurriculumSpec.model_validate(tiny_curriculum(queue={"name": "q", "scheduler": "volcano"})["spec"])
    assert lacking(spec, frozenset({"Workload"})) == []


def test_without_a_queue_nothing_waits_for_kueue():
    job = built()
    assert job["spec"]["suspend"] is False
    assert not [key for key in job["metadata"]["labels"] if "kueue" in key]


def test_workers_share_pods_and_gpus_are_counted():
    stages = [tiny_stage("warmup"), tiny_stage("align", resources={"workers": [8, 16], "gpus_per_worker": 1})]
    runtime = {"image": "i", "workersPerPod": 8, "worker": {"cpu": "96", "memory": "900Gi"}}
    group = built(stages=stages, runtime=runtime)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (1, 2, 2)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_names_fit_kuberay():
    assert len(manifests.rayjob_name("n" * 30, 31, 99_999)) <= 47
    with pytest.raises(ValueError, match="47"):
        manifests.rayjob_name("n" * 47, 1, 1)


def test_objects_beside_the_rayjob_are_valid_and_give_the_least_rights():
    body = owner(tiny_curriculum())
    objects = [manifests.progress_config_map(body), manifests.disruption_budget(body), *manifests.trainer_access(body),
               manifests.recipe_config_map(body, "0" * 16, "name: x")]  # fmt: skip
    for item in objects:
        validate(item)
        assert item["metadata"]["ownerReferences"][0]["uid"] == "u-1"
    role = next(item for item in objects if item["kind"] == "Role")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["tiny-progress"], "verbs": ["get", "patch"]}
    ]


def test_every_file_under_k8s_parses():
    for path in sorted(path for path in (ROOT / "k8s").rglob("*.yaml") if path.parent.name != "templates"):
        assert list(yaml.safe_load_all(path.read_text())), path


def operator_role():
    return next(b for b in yaml.safe_load_all((ROOT / "k8s/operator/rbac.yaml").read_text()) if b["kind"] == "Role")


def test_operator_has_no_rights_on_secrets_or_pods_and_no_wildcards():
    for rule in operator_role()["rules"]:
        words = set(rule["resources"]) | set(rule["verbs"]) | set(rule["apiGroups"])
        assert not words & {"*", "secrets", "pods", "pods/exec", "nodes"}


def test_every_verb_is_justified_in_the_docs():
    table = (ROOT / "docs/kubernetes.md").read_text()
    for rule in operator_role()["rules"]:
        for resource in rule["resources"]:
            for verb in rule["verbs"]:
                assert re.search(rf"^\| `{re.escape(resource)}` \| {verb} \|", table, re.MULTILINE), f"{resource} {verb}"


def test_the_operator_uses_every_right_and_no_other(crd):
    """Run a curriculum with a failure, a suspend and a rerun under a guard that holds the Role; count which verbs were used."""
    from fake.kuberay import Cluster  # noqa: F401

    from terrace.cluster.api import KINDS

    allowed = {(resource, verb) for rule in operator_role()["rules"] for resource in rule["resources"] for verb in rule["verbs"]}
    used = set()
    bench = Bench(crd)

    class Guarded:
        namespace = "default"

        def __getattr__(self, name):
            call = getattr(bench.store, name)

            def checked(*args, **kwargs):
                kind = args[0]["kind"] if isinstance(args[0], dict) else args[0]
                verb = {"replace_status": "update", "replace": "update"}.get(name, name)
                resource = KINDS[kind].plural + ("/status" if name == "replace_status" else "")
                assert (resource, verb) in allowed, f"the Role does not allow {verb} {resource}"
                used.add((resource, verb))
                return call(*args, **kwargs)

            return checked

    bench.controller.api = Guarded()
    bench.controller.resync()
    bench.store.create(tiny_curriculum(behaviour={"steps": 20, "step_seconds": 0.1, "stages": {"align": {"attempts": {"1": {"exit": 1}}}}}))
    bench.run(1.5)
    bench.edit(suspend=True)
    bench.run_until("Suspended")
    bench.edit(suspend=False)
    bench.run_until("Succeeded")
    # Watches are kopf's, `get` of the others happens when a name is taken, leases are the leader's (tests of their own).
    left = {pair for pair in allowed - used if pair[1] not in ("watch", "get") and pair[0] != "leases"}
    assert left == {("curricula/finalizers", "update")}


def test_render_prints_a_resource_that_the_api_server_accepts(crd):
    recipe = load_recipe(ROOT / "jobs/recipes/demo.yaml")
    body = render_curriculum(recipe, load_cluster(ROOT / "k8s/examples/cluster-cpu.yaml"), "tiny", "terrace")
    again = yaml.safe_load(to_yaml(body))
    assert Bench(crd).store.create(again)["spec"]["storage"]["uri"] == "/runs/tiny"


def test_render_refuses_what_cannot_run():
    recipe = load_recipe(ROOT / "jobs/recipes/demo.yaml")
    cluster = load_cluster(ROOT / "k8s/examples/cluster-cpu.yaml")
    tight = cluster.model_copy(update={"runtime": cluster.runtime.model_copy(update={"workers_per_pod": 16})})
    with pytest.raises(InputError, match=r"runtime\.worker\.cpu"):
        render_curriculum(recipe, tight)
    with pytest.raises(InputError, match="beginning with a letter"):
        render_curriculum(recipe, cluster, "Wrong_Name")


@pytest.mark.parametrize("name", ["mimo-vl-morl", "tiny-cpu"])
def test_examples_are_accepted_by_the_api_server_and_by_the_operator(crd, name):
    from terrace_operator.recipes import check

    body = yaml.safe_load((ROOT / f"k8s/examples/{name}.yaml").read_text())
    made = Bench(crd).store.create(body)
    assert check(made["spec"])[1] == ""


def test_operator_imports_neither_torch_nor_ray():
    code = (
        "import sys, terrace_operator.__main__, terrace.cluster.kubernetes; "
        "print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={
        "PYTHONPATH": f"{ROOT}/platform:{ROOT}/operators", "PATH": "/usr/bin"})  # fmt: skip
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
