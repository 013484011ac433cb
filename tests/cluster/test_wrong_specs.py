"""Specs that could only make pods that never exist, or nonsense: each is refused by the API server or by the operator, in words,
before anything is created; and what is unusual but right is accepted by both.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
from cluster_world import ROOT, Bench, condition, tiny_curriculum, tiny_stage

from terrace.cluster.api import Refused
from terrace.cluster.manifests import build_rayjob
from terrace.cluster.pod_rules import pod_problems
from terrace_operator.recipes import check


def put(*path_value):
    """A change that sets one value of the spec."""
    *path, value = path_value

    def change(body):
        node = body["spec"]
        for part in path[:-1]:
            node = node[part] if isinstance(part, int) else node.setdefault(part, {})
        node[path[-1]] = value

    return change


def volumes(*mounts, uri=None, **more):
    def change(body):
        body["spec"]["storage"]["volumes"] = [{"claim": f"c{n}", "mountPath": mount, **more} for n, mount in enumerate(mounts)]
        if uri:
            body["spec"]["storage"]["uri"] = uri

    return change


def toleration(**values):
    return put("runtime", "tolerations", [values])


def env(*pairs):
    return put("runtime", "env", [{"name": name, "value": value} for name, value in pairs])


def stage(**values):
    return lambda body: body["spec"]["recipe"]["stages"][0].update(values)


SERVER, OPERATOR = "server", "operator"
WRONG = {
    # paths
    "path beside the volume": (volumes("/runs", uri="/runs2/x"), SERVER, r"storage.uri: .*mounted at it or above"),
    "path without any volume": (put("storage", "uri", "/runs/x"), SERVER, "mounted at it or above"),
    "run on a read-only volume": (volumes("/runs", uri="/runs/x", readOnly=True), SERVER, "must be able to write"),
    "run on the read-only one of two nested volumes": (put("storage", {"uri": "/runs/x/y", "volumes": [
        {"claim": "a", "mountPath": "/runs"}, {"claim": "b", "mountPath": "/runs/x", "readOnly": True}]}), SERVER, "able to write"),
    "path with ..": (volumes("/runs", uri="/runs/../etc"), SERVER, "uri: Invalid value"),
    "path with a double slash": (volumes("/runs", uri="/runs//x"), SERVER, "uri: Invalid value"),
    "two volumes at one path": (volumes("/data", "/data"), SERVER, "Duplicate value"),
    "two volumes at one path, one with a slash at its end": (volumes("/data", "/data/"), SERVER, "mountPath: Invalid value"),
    "volume at the scratch folder": (volumes("/tmp"), SERVER, "pod's own"),
    "volume in the scratch folder": (volumes("/tmp/cache"), SERVER, "pod's own"),
    "volume at the recipe": (volumes("/etc/terrace"), SERVER, "pod's own"),
    "volume in the recipe's folder": (volumes("/etc/terrace/more"), SERVER, "pod's own"),
    "volume over the shared memory": (volumes("/dev/shm"), SERVER, "pod's own"),
    "volume over /etc": (volumes("/etc"), SERVER, "pod's own"),
    "volume over the account's token": (volumes("/var/run/secrets/kubernetes.io"), SERVER, "pod's own"),
    "volume over everything": (volumes("/"), SERVER, "mountPath: Invalid value"),
    "mount path with a newline": (volumes("/data\n"), SERVER, "mountPath: Invalid value"),
    "mount path with a colon": (volumes("/data:ro"), SERVER, "mountPath: Invalid value"),
    "mount path that is relative": (volumes("data"), SERVER, "mountPath: Invalid value"),
    "mount path with dots": (volumes("/data/../tmp"), SERVER, "mountPath: Invalid value"),
    "working folder that is relative": (put("runtime", "workingDir", "opt/terrace"), SERVER, "workingDir: Invalid value"),
    "s3 without a bucket": (put("storage", "uri", "s3:///x"), SERVER, "uri: Invalid value"),
    "s3 bucket in upper case": (put("storage", "uri", "s3://Bucket/x"), SERVER, "uri: Invalid value"),
    "volume over the system's programs": (volumes("/usr/local/bin"), SERVER, "pod's own"),
    "volume in the system's libraries": (volumes("/lib/x86_64-linux-gnu"), SERVER, "pod's own"),
    "volume over the list of users": (volumes("/etc/passwd"), SERVER, "pod's own"),
    "volume over the hosts": (volumes("/etc/hosts"), SERVER, "pod's own"),
    "volume over the program": (volumes("/opt/terrace"), OPERATOR, "hide the program"),
    "volume over all of /opt": (volumes("/opt"), OPERATOR, "hide the program"),
    "volume in the run directory": (volumes("/runs", "/runs/x/checkpoints", uri="/runs/x"), SERVER, "inside the run directory"),
    "s3 bucket with two dots": (put("storage", "uri", "s3://a..b/x"), SERVER, "uri: Invalid value"),
    "s3 bucket of two letters": (put("storage", "uri", "s3://ab/x"), OPERATOR, "no name of a bucket"),
    "s3 bucket of an IP address": (put("storage", "uri", "s3://192.168.0.1/x"), OPERATOR, "no name of a bucket"),
    "s3 bucket that S3 reserves": (put("storage", "uri", "s3://xn--bucket/x"), OPERATOR, "no name of a bucket"),
    "s3 folder with dots": (put("storage", "uri", "s3://bucket/../x"), SERVER, "uri: Invalid value"),
    "s3 folder that is empty": (put("storage", "uri", "s3://bucket//x"), SERVER, "uri: Invalid value"),
    "s3 with a query": (put("storage", "uri", "s3://bucket/x?versionId=1"), SERVER, "uri: Invalid value"),
    "s3 with credentials": (put("storage", "uri", "s3://key:secret@bucket/x"), SERVER, "uri: Invalid value"),
    "source in no bucket": (put("recipe", "data", "sources", "captions", "uri", "s3:///x"), OPERATOR, "no name of a bucket"),
    "source of another cloud": (put("recipe", "data", "sources", "captions", "uri", "gs://x/y"), OPERATOR, "gs:// is not read"),
    "model in no bucket": (put("recipe", "model", {"pretrained": "s3:///x"}), OPERATOR, "no name of a bucket"),
    "model on the web": (put("recipe", "model", {"pretrained": "https://x/y"}), OPERATOR, "https:// is not read"),
    "data where nothing can be written": (put("recipe", "data", "cache_dir", "/etc/x"), OPERATOR, "cannot be written"),
    "offload where nothing can be written": (
        stage(parallel={"strategy": "zero3", "offload_optimizer": "nvme", "nvme_path": "/nvme"}), OPERATOR, "cannot be written"),
    "claim of no form": (lambda b: volumes("/data")(b) or b["spec"]["storage"]["volumes"][0].update(claim="a..b"), SERVER, "claim"),
    # tolerations
    "seconds without NoExecute": (toleration(key="a", effect="NoSchedule", tolerationSeconds=5), SERVER, "needs effect NoExecute"),
    "seconds without an effect": (toleration(key="a", tolerationSeconds=5), SERVER, "needs effect NoExecute"),
    "Exists with a value": (toleration(key="a", operator="Exists", value="x"), SERVER, "compares no value"),
    "a value and no operator": (toleration(key="a", value="x"), SERVER, "compares no value"),
    "Equal without a key": (toleration(operator="Equal", value="x"), SERVER, "Equal needs a key"),
    "toleration key of no form": (toleration(key="bad key!"), SERVER, "key: Invalid value"),
    "toleration value of no form": (toleration(key="a", operator="Equal", value="h 100"), SERVER, "value: Invalid value"),
    "toleration key with a long prefix": (toleration(key="a." * 125 + "com/b"), SERVER, "key: Too long"),
    "negative seconds": (toleration(key="a", effect="NoExecute", tolerationSeconds=-1), SERVER, "tolerationSeconds: Invalid value"),
    "seconds of a century": (toleration(key="a", effect="NoExecute", tolerationSeconds=2**33), SERVER, "tolerationSeconds: Invalid value"),
    "unknown operator": (toleration(key="a", operator="Gt", value="1"), SERVER, "operator: Unsupported value"),
    "unknown effect": (toleration(key="a", effect="NoRun"), SERVER, "effect: Unsupported value"),
    # selectors and labels
    "selector value with a blank": (put("runtime", "nodeSelector", {"pool": "h 100"}), SERVER, "pool: Invalid value"),
    "selector value that is too long": (put("runtime", "nodeSelector", {"pool": "a" * 64}), SERVER, "pool: Too long"),
    "selector key with a blank": (put("runtime", "nodeSelector", {"bad key!": "x"}), SERVER, "no name of a label"),
    "selector key with two slashes": (put("runtime", "nodeSelector", {"a/b/c": "x"}), SERVER, "no name of a label"),
    "selector key that is empty": (put("runtime", "nodeSelector", {"": "x"}), SERVER, "no name of a label"),
    "selector key with a long name": (put("runtime", "nodeSelector", {"a/" + "b" * 64: "x"}), SERVER, "no name of a label"),
    "selector key with a long prefix": (put("runtime", "nodeSelector", {"a." * 127 + "c/x": "y"}), OPERATOR, "no name of a label"),
    "selector key in upper case before the slash": (put("runtime", "nodeSelector", {"A.com/x": "y"}), SERVER, "no name of a label"),
    "selector value that is a number": (put("runtime", "nodeSelector", {"x": 1}), SERVER, "must be of type string"),
    "label of no form": (lambda b: b["metadata"].update(labels={"team": "vision language"}), SERVER, "metadata.labels: Invalid value"),
    "label key of no form": (lambda b: b["metadata"].update(labels={"my team": "x"}), SERVER, "metadata.labels: Invalid value"),
    "annotation key of no form": (lambda b: b["metadata"].update(annotations={"a/b/c": "x"}), SERVER, "metadata.annotations: Invalid"),
    "finalizer of no form": (lambda b: b["metadata"].update(finalizers=["not mine"]), SERVER, "metadata.finalizers: Invalid value"),
    "topology of no form": (put("queue", {"name": "q", "topologyRequired": "not a label!"}), SERVER, "topologyRequired: Invalid"),
    "topology with two slashes": (put("queue", {"name": "q", "topologyPreferred": "a/b/c"}), SERVER, "topologyPreferred: Invalid"),
    "queue with a blank": (put("queue", {"name": "my queue"}), SERVER, "queue.name: Invalid"),
    "queue of Kueue with a dot": (put("queue", {"name": "root.a"}), SERVER, "without dots"),
    "topology without Kueue": (put("queue", {"name": "q", "scheduler": "volcano", "topologyRequired": "rack"}), SERVER, "are Kueue's"),
    "priority of YuniKorn": (put("queue", {"name": "q", "scheduler": "yunikorn", "priorityClass": "a"}), SERVER, "YuniKorn has no"),
    "priority class of no form": (put("queue", {"name": "q", "priorityClass": "High!"}), SERVER, "priorityClass: Invalid"),
    # images
    "image with a leading blank": (put("runtime", "image", " terrace:1"), SERVER, "image: Invalid value"),
    "image with a trailing blank": (put("runtime", "image", "terrace:1 "), SERVER, "image: Invalid value"),
    "image in upper case": (put("runtime", "image", "registry.example/Terrace:1"), SERVER, "image: Invalid value"),
    "image with two tags": (put("runtime", "image", "terrace:1:2"), SERVER, "image: Invalid value"),
    "image with an empty tag": (put("runtime", "image", "terrace:"), SERVER, "image: Invalid value"),
    "image with a short digest": (put("runtime", "image", "terrace@sha256:abc"), SERVER, "image: Invalid value"),
    "image with a digest that is one short": (put("runtime", "image", "terrace@sha256:" + "a" * 63), SERVER, "image: Invalid value"),
    "image with a digest in upper case": (put("runtime", "image", "terrace@sha256:" + "A" * 64), SERVER, "image: Invalid value"),
    "image of a port that is none": (put("runtime", "image", "registry.example:99999/terrace:1"), SERVER, "image: Invalid value"),
    "image of 64 hexadecimal digits": (put("runtime", "image", "a" * 64), OPERATOR, "no name of an image"),
    "image of a very long name": (put("runtime", "image", "team/" * 60 + "terrace:1"), OPERATOR, "no name of an image"),
    "image with a blank in it": (put("runtime", "image", "terrace 1"), SERVER, "image: Invalid value"),
    "image with a newline": (put("runtime", "image", "terrace:1\n"), SERVER, "image: Invalid value"),
    "image as a URL": (put("runtime", "image", "https://registry.example/terrace"), SERVER, "image: Invalid value"),
    "pull secret of no form": (put("runtime", "imagePullSecrets", ["My Secret"]), SERVER, "imagePullSecrets"),
    # quantities
    "no memory": (put("runtime", "worker", {"memory": "0Gi"}), SERVER, "at least 64Mi of memory"),
    "memory of nothing": (put("runtime", "worker", {"memory": "0"}), SERVER, "memory: Invalid value"),
    "memory in bytes": (put("runtime", "worker", {"memory": "4"}), SERVER, "memory: Invalid value"),
    "memory in thousandths": (put("runtime", "worker", {"memory": "64000m"}), SERVER, "memory: Invalid value"),
    "memory of one megabyte": (put("runtime", "head", {"memory": "1Mi", "sharedMemory": "1Mi"}), SERVER, "at least 64Mi of memory"),
    "memory in GB": (put("runtime", "worker", {"memory": "64GB"}), SERVER, "memory: Invalid value"),
    "memory of no machine": (put("runtime", "worker", {"memory": "1000Ti"}), SERVER, "no machine has more"),
    "CPU of no machine": (put("runtime", "worker", {"cpu": "9999"}), SERVER, "no machine has more"),
    "scratch of no machine": (put("storage", "scratch", "999999999Ti"), SERVER, "no machine has more"),
    "memory as a number": (put("runtime", "worker", {"memory": 4}), SERVER, "must be of type string"),
    "negative memory": (put("runtime", "worker", {"memory": "-1Gi"}), SERVER, "memory: Invalid value"),
    "no CPU": (put("runtime", "worker", {"cpu": "0"}), SERVER, "at least 10m of CPU"),
    "CPU in gigabytes": (put("runtime", "worker", {"cpu": "4Gi"}), SERVER, "cpu: Invalid value"),
    "negative CPU": (put("runtime", "worker", {"cpu": "-1"}), SERVER, "cpu: Invalid value"),
    "shared memory above memory": (put("runtime", "worker", {"memory": "4Gi", "sharedMemory": "8Gi"}), SERVER, "exceeds memory"),
    "scratch of one byte": (put("storage", "scratch", "1"), SERVER, "scratch: "),
    "scratch of one megabyte": (put("storage", "scratch", "1Mi"), SERVER, "scratch needs at least 64Mi"),
    "GPU resource without a domain": (put("runtime", "gpuResource", "gpu"), SERVER, "gpuResource: Invalid value"),
    "GPU resource of Kubernetes itself": (put("runtime", "gpuResource", "kubernetes.io/gpu"), SERVER, "extended resource"),
    "GPU resource of a quota": (put("runtime", "gpuResource", "requests.nvidia.com/gpu"), SERVER, "extended resource"),
    "GPUs of no machine": (stage(resources={"workers": 1, "gpus_per_worker": 1000}), OPERATOR, "GPUs in one pod are more"),
    "user above 32 bits": (put("runtime", "runAsUser", 2**31), SERVER, "runAsUser: Invalid value"),
    # env and entrypoint
    "env over our own": (env(("TERRACE_ATTEMPT", "99"), ("TERRACE_PROGRESS", "x")), SERVER, "set by Terrace or KubeRay"),
    "env over the temporary folder": (env(("TMPDIR", "/data")), SERVER, "set by Terrace or KubeRay"),
    "env over Ray's own": (env(("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")), SERVER, "set by Terrace or KubeRay"),
    "env over a rank": (env(("LOCAL_RANK", "0")), SERVER, "Ray Train"),
    "env over the device plugin": (env(("NVIDIA_VISIBLE_DEVICES", "all")), SERVER, "device plugin"),
    "env over Kubernetes's own": (env(("KUBERNETES_PORT", "x")), SERVER, "set by Terrace or KubeRay"),
    "env over the endpoint of S3": (env(("AWS_ENDPOINT_URL_S3", "http://x")), SERVER, "set by Terrace or KubeRay"),
    "env over a Secret": (lambda b: (env(("AWS_SECRET_ACCESS_KEY", "x"))(b), put("storage", "credentialsSecret", "s3")(b)), OPERATOR,
                          "would win over the one of storage.credentialsSecret"),
    "env value with a NUL": (env(("A", "a\0b")), SERVER, "value: Invalid value"),
    "env name with a digit first": (env(("1A", "x")), SERVER, "name: Invalid value"),
    "entrypoint with a NUL": (put("runtime", "entrypoint", ["python\0"]), SERVER, r"entrypoint\[0\]: Invalid value"),
    "env over Ray's address": (env(("RAY_ADDRESS", "auto")), SERVER, "set by Terrace or KubeRay"),
    "env over the tracking block": (env(("MLFLOW_TRACKING_URI", "http://x")), SERVER, "set by Terrace or KubeRay"),
    "env twice": (env(("A", "1"), ("A", "2")), SERVER, "Duplicate value"),
    "env name with a dash": (env(("A-B", "1")), SERVER, "name: Invalid value"),
    "empty entrypoint word": (put("runtime", "entrypoint", [""]), SERVER, r"entrypoint\[0\]: Invalid value"),
    "blank entrypoint word": (put("runtime", "entrypoint", ["python", " "]), SERVER, r"entrypoint\[1\]: Invalid value"),
    # budgets, backoffs, times
    "steps without an end": (stage(budget={"steps": 10**12}), SERVER, "would never end"),
    "tokens without an end": (stage(budget={"tokens": 1e20}), SERVER, "would never end"),
    "epochs without an end": (stage(budget={"epochs": 1e9}), SERVER, "would never end"),
    "seed of more than 64 bits": (put("recipe", "data", "seed", 2**70), SERVER, "seed: Invalid value"),
    "negative steps": (stage(budget={"steps": -1}), SERVER, "steps: Invalid value"),
    "sequence of no model": (stage(sequence_length=10**12), OPERATOR, "which no model reads"),
    "batch without an end": (stage(batch={"packs": 10**12}), OPERATOR, "batch.packs"),
    "rate of no training": (stage(train={"projector": {"lr": 1e9}}), OPERATOR, "lr 1e\\+09 is more"),
    "grace of years": (stage(failure={"preemption_grace_seconds": 1e9}), OPERATOR, "that a pod gets to end"),
    "a stage's stall timeout below a report's interval": (stage(failure={"stall_timeout_seconds": 1}), OPERATOR, "would count as silent"),
    "first delay over the stages' cap": (put("failurePolicy", {"backoffSeconds": 5000}), SERVER, "exceeds a stage's"),
    "cap under the stages' first delay": (put("failurePolicy", {"backoffCapSeconds": 1}), SERVER, "less than a stage's"),
    "first delay over its cap": (put("failurePolicy", {"backoffSeconds": 9, "backoffCapSeconds": 1}), SERVER, "must not exceed"),
    "stall timeout below a report's interval": (put("failurePolicy", {"stallTimeoutSeconds": 0.001}), SERVER, "stallTimeoutSeconds: Inv"),
    "grace that ends before the checkpoint": (put("runtime", "terminationGraceSeconds", 20), OPERATOR, "raise runtime.termination"),
    "a million pods": (stage(resources={"workers": 10**6}, batch={"packs": 10**6}), OPERATOR, "more than the 5000"),
    "workers that do not divide into pods": (
        lambda b: (b["spec"]["runtime"].update(workersPerPod=8, worker={"cpu": "64"}),
                   stage(resources={"workers": 12}, batch={"packs": 12})(b)),
        OPERATOR, "do not divide into pods of 8"),
    # addresses
    "MLflow address of no form": (put("tracking", {"mlflowUri": "mlflow server"}), SERVER, "mlflowUri: Invalid value"),
    "MLflow address without a host": (put("tracking", {"mlflowUri": "http:///x"}), SERVER, "mlflowUri: Invalid value"),
    "endpoint with a port that is none": (put("storage", "endpointUrl", "http://minio:99999"), SERVER, "endpointUrl: Invalid value"),
    "endpoint with a port in words": (put("storage", "endpointUrl", "http://minio:port"), SERVER, "endpointUrl: Invalid value"),
    "endpoint with credentials": (put("storage", "endpointUrl", "http://key:secret@minio:9000"), SERVER, "endpointUrl: Invalid value"),
    "endpoint with a query": (put("storage", "endpointUrl", "http://minio:9000?x=1"), SERVER, "endpointUrl: Invalid value"),
    "endpoint of a host that is none": (put("storage", "endpointUrl", "http://-minio-/"), SERVER, "endpointUrl: Invalid value"),
    "MLflow with credentials": (put("tracking", {"mlflowUri": "http://u:p@mlflow:5000"}), SERVER, "mlflowUri: Invalid value"),
    "experiment of blanks": (put("tracking", {"experiment": " "}), SERVER, "experiment: Invalid value"),
    "Ray of long ago": (put("runtime", "rayVersion", "1.13.0"), SERVER, "rayVersion: Invalid value"),
    "endpoint without a host": (put("storage", "endpointUrl", "http://"), SERVER, "endpointUrl: Invalid value"),
    "region with a blank": (put("storage", "region", "eu west"), SERVER, "region: Invalid value"),
    "Ray version of no form": (put("runtime", "rayVersion", "2.60.0 or so"), SERVER, "rayVersion: Invalid value"),
    "name with a trailing dash": (lambda b: b["metadata"].update(name="tiny-"), SERVER, r"metadata\.name: Invalid value"),
    "name with a dot": (lambda b: b["metadata"].update(name="ti.ny"), SERVER, r"metadata: Invalid value: metadata\.name"),
    "name with a digit first": (lambda b: b["metadata"].update(name="1tiny"), SERVER, r"metadata: Invalid value: metadata\.name"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_spec_is_refused_before_anything_is_created(crd, what):
    change, by, expected = WRONG[what]
    bench, body = Bench(crd), tiny_curriculum()
    change(body)
    if by == SERVER:
        with pytest.raises(Refused) as caught:
            bench.store.create(body)
        assert re.search(expected, str(caught.value)), str(caught.value)
        return
    bench.store.create(body)
    bench.run(1.0)
    accepted = condition(bench.status(), "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "InvalidSpec")
    assert re.search(expected, accepted["message"]), accepted["message"]
    assert bench.jobs() == []


@pytest.mark.parametrize("what", [what for what, (_, by, _) in WRONG.items() if by == SERVER])
def test_what_the_server_refuses_the_operator_refuses_too(what):
    """`terrace render` has no API server, and a Curriculum may be older than its CRD."""
    body = tiny_curriculum()
    WRONG[what][0](body)
    about_metadata = what.startswith(("name ", "label ", "annotation ", "finalizer ", "seed "))  # Python has longer numbers
    assert about_metadata or check(body["spec"])[1] != ""


RIGHT = {
    "nothing unusual": lambda b: None,
    "a run at a volume's own folder": volumes("/runs", uri="/runs"),
    "a writable volume in a read-only one": put("storage", {"uri": "/corpus/runs/x", "volumes": [
        {"claim": "a", "mountPath": "/corpus", "readOnly": True}, {"claim": "b", "mountPath": "/corpus/runs"}]}),
    "a hidden folder": volumes("/data/.cache"),
    "certificates below /etc": volumes("/etc/ssl/certs"),
    "tolerate everything": toleration(),
    "tolerate for a while": toleration(key="node.kubernetes.io/unreachable", effect="NoExecute", tolerationSeconds=60),
    "tolerate one value": toleration(key="pool", operator="Equal", value="h100", effect="NoSchedule"),
    "an empty selector value": put("runtime", "nodeSelector", {"node-role.kubernetes.io/gpu": ""}),
    "registry with a port and a digest": put("runtime", "image", "localhost:5000/team/terrace:1.2@sha256:" + "a" * 64),
    "image of one word": put("runtime", "image", "terrace"),
    "fractions": put("runtime", "worker", {"cpu": "1.5", "memory": "2.5Gi", "sharedMemory": "512Mi"}),
    "thousandths of a core": put("runtime", "head", {"cpu": "1500m", "memory": "2G", "sharedMemory": "1G"}),
    "env of their own": env(("NCCL_DEBUG", "WARN"), ("HF_HOME", "/data/hub"), ("RAY_BACKEND_LOG_LEVEL", "debug")),
    "a program in the entrypoint": put("runtime", "entrypoint", ["python", "-c", "import sys\nprint(1)\n"]),
    "a resource of another maker": put("runtime", "gpuResource", "amd.com/gpu"),
    "fifteen trillion tokens": stage(budget={"tokens": 15e12}),
    "both delays": put("failurePolicy", {"backoffSeconds": 5000, "backoffCapSeconds": 10_000}),
    "a bucket with a slash at its end": put("storage", "uri", "s3://bucket/runs/"),
    "a hidden folder in a bucket": put("storage", "uri", "s3://bucket/.runs/v1..2"),
    "an endpoint with port and path": put("storage", "endpointUrl", "http://minio.storage.svc:9000/s3"),
    "an endpoint by IPv6": put("storage", "endpointUrl", "http://[fd00::1]:9000"),
    "a database of MLflow": put("tracking", {"mlflowUri": "postgresql://user:word@db/mlflow"}),
    "data of a package under /usr/share": volumes("/usr/share/nltk_data"),
    "a program of their own in a volume": lambda b: (volumes("/opt/terrace")(b), put("runtime", "workingDir", "/opt/terrace/code")(b)),
    "offload to a volume": lambda b: (volumes("/nvme")(b), stage(
        parallel={"strategy": "zero3", "offload_optimizer": "nvme", "nvme_path": "/nvme/x"})(b)),
    "labels of their own": lambda b: b["metadata"].update(labels={"example.com/team": "vision_2"}, annotations={"a.b/C": "x y"}),
    "a bucket alone": put("storage", "uri", "s3://my-bucket.example"),
    "MLflow on Databricks": put("tracking", {"mlflowUri": "databricks"}),
    "a queue of YuniKorn": put("queue", {"name": "root.team-a", "scheduler": "yunikorn"}),
    "a queue of Volcano": put("queue", {"name": "training", "scheduler": "volcano", "priorityClass": "high"}),
    "topology by host": put("queue", {"name": "training", "topologyRequired": "kubernetes.io/hostname"}),
    "a development version of Ray": put("runtime", "rayVersion", "3.0.0.dev0"),
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_unusual_but_right_specs_are_accepted_by_both(crd, what):
    body = tiny_curriculum()
    RIGHT[what](body)
    made = Bench(crd).store.create(body)
    spec, problem = check(made["spec"])
    assert problem == ""
    job = build_rayjob({**made, "metadata": {**made["metadata"], "uid": "u"}}, spec, 0, 1, "tiny-recipe-0")["spec"]
    for template in (job["rayClusterSpec"]["headGroupSpec"]["template"], job["rayClusterSpec"]["workerGroupSpecs"][0]["template"]):
        assert pod_problems(template) == []


def test_every_pod_rule_can_fail():
    """Break each field that the rules look at, in a template that is right."""
    from cluster_world import build_template

    def broken(change):
        template = build_template()
        change(template, template["spec"], template["spec"]["containers"][0])
        return pod_problems(template)

    assert broken(lambda t, s, c: None) == []
    changes = {
        "is no label": lambda t, s, c: t["metadata"]["labels"].update({"a b": "x"}),
        "qualified name": lambda t, s, c: t["metadata"].update(annotations={"a b": "x"}),
        "256 KiB": lambda t, s, c: t["metadata"].update(annotations={"a": "x" * 300_000}),
        "no name of a node label": lambda t, s, c: t["metadata"].update(
            annotations={"kueue.x-k8s.io/podset-required-topology": "not a label!"}),
        "DNS label and unique": lambda t, s, c: s["volumes"].append({"name": "scratch", "emptyDir": {}}),
        "exactly one source": lambda t, s, c: s["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "sizeLimit": lambda t, s, c: s["volumes"].append({"name": "x", "emptyDir": {"sizeLimit": "lots"}}),
        "claimName": lambda t, s, c: s["volumes"].append({"name": "x", "persistentVolumeClaim": {"claimName": "A"}}),
        "name: 'Ray_Head'": lambda t, s, c: c.update(name="Ray_Head"),
        "whitespace": lambda t, s, c: c.update(image=" i"),
        "no image reference": lambda t, s, c: c.update(image="I"),
        "no name of a variable": lambda t, s, c: c["env"].append({"name": "a b", "value": ""}),
        "given twice": lambda t, s, c: c["env"].append(dict(c["env"][0])),
        "envFrom": lambda t, s, c: c.update(envFrom=[{"secretRef": {"name": "A"}}]),
        "no volume of the pod": lambda t, s, c: c["volumeMounts"].append({"name": "x", "mountPath": "/x"}),
        "absolute path": lambda t, s, c: c["volumeMounts"].append({"name": "scratch", "mountPath": "/x/../y"}),
        "mountPath /tmp must be unique": lambda t, s, c: c["volumeMounts"].append({"name": "scratch", "mountPath": "/tmp/"}),
        "is no quantity": lambda t, s, c: c["resources"]["limits"].update(cpu="many"),
        "less than or equal to the limit": lambda t, s, c: c["resources"]["requests"].update(cpu="900"),
        "extended one with a domain": lambda t, s, c: c["resources"]["limits"].update(gpu="1"),
        "whole number": lambda t, s, c: c["resources"]["limits"].update({"nvidia.com/gpu": "0.5"}),
        "must equal the limit": lambda t, s, c: c["resources"]["requests"].update({"nvidia.com/gpu": "1"}),
        "port of 1 to 65535": lambda t, s, c: c.update(ports=[{"containerPort": 0}]),
        "names must be unique": lambda t, s, c: c.update(ports=[{"containerPort": 1, "name": "a"}, {"containerPort": 2, "name": "a"}]),
        "negative": lambda t, s, c: s.update(terminationGracePeriodSeconds=-1),
        "2147483647": lambda t, s, c: s["securityContext"].update(runAsUser=2**40),
        "is root": lambda t, s, c: s["securityContext"].update(runAsUser=0),
        "ServiceAccount": lambda t, s, c: s.update(serviceAccountName="Default"),
        "of a Secret": lambda t, s, c: s.update(imagePullSecrets=[{"name": "A b"}]),
    }  # fmt: skip
    for expected, change in changes.items():
        assert any(expected in text for text in broken(change)), (expected, broken(change))


CASES = ROOT.parent / "shared/cases/kubernetes/wrong_specs.py"


@pytest.mark.skipif(not CASES.exists(), reason="the collection of specs seen on a real API server is not at hand")
def test_specs_seen_on_a_real_api_server(crd, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("wrong_specs", CASES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    passed = []
    for name, old, new in module.cases:
        bench = Bench(crd)
        if old is not None:
            stored = bench.store.create(old)
            new = {**new, "metadata": {**stored["metadata"]}}
        try:
            made = bench.store.replace(new) if old is not None else bench.store.create(new)
        except (Refused, KeyError):
            continue
        if check(made["spec"])[1] == "":
            passed.append(name)
    assert passed == ["00 right"]


def test_stages_of_a_wrong_recipe_are_still_refused(crd):
    body = tiny_curriculum(stages=[tiny_stage("warmup", train={})])
    with pytest.raises(Refused, match="at least one part must train"):
        Bench(crd).store.create(body)
