"""Build the Kubernetes objects of one stage attempt: pure functions from typed values to plain dictionaries.

One KubeRay `RayJob` with its own RayCluster per attempt, because Kueue refuses a shared cluster (`clusterSelector`) and because a
program that hangs must not leave a poisoned cluster to the next attempt; the price is one cluster start (about a minute) per
attempt. What the choices below answer to, as seen with the real KubeRay and Kueue:

- `submitterConfig.backoffLimit` above 0: the submitter pod only follows the job, and a new one finds it again (`ray job status ||
  ray job submit`), so its eviction must not end the attempt while the GPUs train. The operator does not wait for a submitter that
  retries after a failed program: it goes by the program's own report and by what Ray says of the job.
- `submitterPodTemplate` with a full securityContext: KubeRay's own has none, and under PodSecurity `restricted` it is refused for
  ever while the cluster holds the GPUs.
- tolerationSeconds 30 for not-ready and unreachable nodes: the default of 300 s is five minutes of idle GPUs.
- topology annotation on every group once a GPU flavor has a topology: a group without one stays pending.
- preStop and a grace period longer than a checkpoint: KubeRay stops a job without asking it.
"""

from __future__ import annotations

import math
import shlex
from typing import Any

from terrace.cluster.cluster_schema import CurriculumSpec, PodSize, Queue, Runtime
from terrace.recipe.schema import Recipe, Stage

Manifest = dict[str, Any]

LABEL_CURRICULUM = "terrace.dev/curriculum"
LABEL_STAGE = "terrace.dev/stage-index"
LABEL_ATTEMPT = "terrace.dev/attempt"
RECIPE_FOLDER = "/etc/terrace"
STOP_FILE = "/tmp/terrace-stop"
NODE_TOLERATION_SECONDS = 30
GRACE_MARGIN_SECONDS = 30
SUBMITTER_RETRIES = 6  # evictions of the submitter pod that an attempt survives
MAX_RAYJOB_NAME = 47


def rayjob_name(curriculum: str, stage_index: int, attempt: int) -> str:
    """`<name>-s<stage index>-<attempt>`: the index, since two stage names can begin alike and exceed 47 characters together."""
    name = f"{curriculum}-s{stage_index}-{attempt}"
    if len(name) > MAX_RAYJOB_NAME:
        raise ValueError(f"RayJob name {name} has {len(name)} characters, KubeRay allows {MAX_RAYJOB_NAME}")
    return name


def progress_name(curriculum: str) -> str:
    """The ConfigMap through which a running attempt reports and is told to stop."""
    return f"{curriculum}-progress"


def progress_prefix(recipe: Recipe, stage_index: int) -> str:
    """What a stage's keys in that ConfigMap begin with: nothing where one stage runs at a time."""
    return "" if recipe.stage_order == "sequence" else f"s{stage_index}."


def trainer_name(curriculum: str) -> str:
    """ServiceAccount, Role and RoleBinding of the training pods."""
    return f"{curriculum}-trainer"


def recipe_name(curriculum: str, digest: str) -> str:
    """ConfigMap with the recipe; named by content, so that a running attempt never sees an edited one."""
    return f"{curriculum}-recipe-{digest[:10]}"


def owner_reference(owner: Manifest) -> Manifest:
    """Makes the cluster's garbage collector delete the object with its Curriculum, whether or not the operator runs."""
    return {
        "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip


def _metadata(owner: Manifest, name: str, **labels: str) -> Manifest:
    metadata: Manifest = {
        "name": name,
        "namespace": owner["metadata"]["namespace"],
        "labels": common_labels(owner["metadata"]["name"]) | labels,
        "ownerReferences": [owner_reference(owner)],
    }
    return metadata


def common_labels(curriculum: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "terrace", "app.kubernetes.io/part-of": "terrace",
        "app.kubernetes.io/managed-by": "terrace-operator", LABEL_CURRICULUM: curriculum,
    }  # fmt: skip


# ---------------------------------------------------------------- small objects beside the RayJob


def recipe_config_map(owner: Manifest, digest: str, recipe_text: str) -> Manifest:
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(owner, recipe_name(owner["metadata"]["name"], digest)),
        "immutable": True, "data": {"recipe.yaml": recipe_text},
    }  # fmt: skip


def progress_config_map(owner: Manifest) -> Manifest:
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(owner, progress_name(owner["metadata"]["name"])),
        "data": {},
    }  # fmt: skip


def trainer_access(owner: Manifest) -> list[Manifest]:
    """ServiceAccount, Role and RoleBinding that let the pods read and patch the one progress ConfigMap, and nothing else."""
    name = trainer_name(owner["metadata"]["name"])
    return [
        {
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(owner, name),
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": _metadata(owner, name),
            "rules": [
                {
                    "apiGroups": [""], "resources": ["configmaps"],
                    "resourceNames": [progress_name(owner["metadata"]["name"])], "verbs": ["get", "patch"],
                }
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": _metadata(owner, name),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": owner["metadata"]["namespace"]}],
        },
    ]  # fmt: skip


def disruption_budget(owner: Manifest) -> Manifest:
    """No voluntary eviction of training pods: draining one node would stop the whole attempt. Drains use `spec.suspend` first.

    `minAvailable` beyond any number of pods says so; `maxUnavailable: 0` needs owners with a scale subresource, which a RayCluster
    is not. Pods that are not ready may go.
    """
    name = owner["metadata"]["name"]
    return {
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": _metadata(owner, f"{name}-trainer"),
        "spec": {
            "minAvailable": 1_000_000, "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": {LABEL_CURRICULUM: name}},
        },
    }  # fmt: skip


# ---------------------------------------------------------------- the RayJob


def worker_bounds(stage: Stage) -> tuple[int, int]:
    """Least and most workers of the stage, training and rollout workers together."""
    workers, more = stage.resources.workers, stage.rollout_workers
    return (workers + more, workers + more) if isinstance(workers, int) else (workers[0] + more, workers[1] + more)


def worker_pods(stage: Stage, runtime: Runtime) -> tuple[int, int]:
    """Least and most worker pods of the stage."""
    low, high = worker_bounds(stage)
    return math.ceil(low / runtime.workers_per_pod), math.ceil(high / runtime.workers_per_pod)


def gpus_per_pod(stage: Stage, runtime: Runtime) -> int:
    return math.ceil(stage.resources.gpus_per_worker * runtime.workers_per_pod)


def allocated_gpus(stage: Stage, runtime: Runtime) -> int:
    return gpus_per_pod(stage, runtime) * worker_pods(stage, runtime)[1]


def entrypoint(spec: CurriculumSpec, stage: Stage, attempt: int, rerun: int = 0) -> str:
    command = [*spec.runtime.entrypoint, f"{RECIPE_FOLDER}/recipe.yaml", "--run-dir", spec.storage.uri]
    command += ["--stage", stage.name, "--attempt", str(attempt)]
    if rerun:
        command += ["--rerun", str(rerun)]
    return shlex.join(command)


def build_rayjob(owner: Manifest, spec: CurriculumSpec, stage_index: int, attempt: int, recipe_map: str, rerun: int = 0) -> Manifest:
    """The RayJob of attempt `attempt` (from 1) of stage `stage_index` (from 0).

    `owner` is the Curriculum as the API server returned it, `recipe_map` the ConfigMap with the recipe; a `rerun` above 0 tells
    the program to move what earlier runs of the stage wrote aside first.
    """
    stage = spec.recipe.stages[stage_index]
    curriculum = owner["metadata"]["name"]
    labels = {LABEL_STAGE: str(stage_index), LABEL_ATTEMPT: str(attempt)}
    metadata = _metadata(owner, rayjob_name(curriculum, stage_index, attempt), **labels)
    metadata["labels"] |= queue_labels(spec.queue, metadata["name"])
    pods = _PodBuilder(owner, spec, stage, labels, recipe_map, attempt)
    least, most = worker_pods(stage, spec.runtime)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": entrypoint(spec, stage, attempt, rerun),
            "entrypointNumCpus": 0,
            "submissionMode": "K8sJobMode",
            "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 0,
            "preRunningDeadlineSeconds": spec.failure_policy.pre_running_timeout_seconds,
            "suspend": spec.queue is not None and spec.queue.scheduler == "kueue",  # Kueue admits it by setting false
            "submitterPodTemplate": pods.submitter(),
            "rayClusterSpec": {
                "rayVersion": spec.runtime.ray_version,
                "enableInTreeAutoscaling": False,
                "headGroupSpec": {
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
                    "template": pods.head(),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers", "replicas": most, "minReplicas": least, "maxReplicas": most, "numOfHosts": 1,
                        "rayStartParams": {"num-gpus": str(gpus_per_pod(stage, spec.runtime))},
                        "template": pods.worker(),
                    }
                ],
            },
        },
    }  # fmt: skip


def queue_labels(queue: Queue | None, rayjob: str) -> dict[str, str]:
    """What tells the scheduler of the queue: Kueue reads the RayJob, the others what KubeRay passes on of it (kuberay
    ray-operator/controllers/ray/batchscheduler)."""
    if queue is None:
        return {}
    if queue.scheduler == "kueue":
        labels = {"kueue.x-k8s.io/queue-name": queue.name, "kueue.x-k8s.io/priority-class": queue.priority_class}
    elif queue.scheduler == "volcano":
        labels = {"volcano.sh/queue-name": queue.name, "ray.io/priority-class-name": queue.priority_class}
    else:
        labels = {"yunikorn.apache.org/app-id": rayjob, "yunikorn.apache.org/queue": queue.name, "ray.io/gang-scheduling-enabled": "true"}
    return {key: value for key, value in labels.items() if value}


class _PodBuilder:
    """The three pod templates of an attempt share volumes, environment and security; this holds what they share."""

    def __init__(self, owner: Manifest, spec: CurriculumSpec, stage: Stage, labels: dict[str, str], recipe_map: str, attempt: int) -> None:
        self.curriculum, self.namespace = owner["metadata"]["name"], owner["metadata"]["namespace"]
        self.spec, self.stage, self.runtime, self.attempt = spec, stage, spec.runtime, attempt
        self.labels, self.index = common_labels(self.curriculum) | labels, int(labels[LABEL_STAGE])
        self.recipe_map = recipe_map
        grace = stage.failure.preemption_grace_seconds + GRACE_MARGIN_SECONDS
        self.grace_seconds = spec.runtime.termination_grace_seconds or math.ceil(grace)

    def head(self) -> Manifest:
        container = self._container("ray-head", self.runtime.head)
        container["ports"] = [
            {"containerPort": 6379, "name": "gcs-server"}, {"containerPort": 8265, "name": "dashboard"},
            {"containerPort": 10001, "name": "client"}, {"containerPort": 8080, "name": "metrics"},
        ]  # fmt: skip
        # The head alone talks to the API server: it reports progress.
        return self._template(container, self.runtime.head, role="head", api_token=True)

    def worker(self) -> Manifest:
        container = self._container("ray-worker", self.runtime.worker)
        container["ports"] = [{"containerPort": 8080, "name": "metrics"}]
        if gpus := gpus_per_pod(self.stage, self.runtime):
            for kind in ("requests", "limits"):
                container["resources"][kind][self.runtime.gpu_resource] = str(gpus)
        template = self._template(container, self.runtime.worker, role="worker", api_token=False)
        if self.runtime.node_selector:
            template["spec"]["nodeSelector"] = dict(self.runtime.node_selector)
        return template

    def submitter(self) -> Manifest:
        container = self._container("ray-job-submitter", self.runtime.submitter)
        container.pop("lifecycle")
        template = self._template(container, self.runtime.submitter, role="submitter", api_token=False)
        template["spec"]["restartPolicy"] = "Never"
        return template

    def _container(self, name: str, size: PodSize) -> Manifest:
        amounts = {"cpu": size.cpu, "memory": size.memory}
        mounts = [
            {"name": "scratch", "mountPath": "/tmp"},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
        ]
        for number, volume in enumerate(self.spec.storage.volumes):
            mounts.append({"name": f"data-{number}", "mountPath": volume.mount_path, "readOnly": volume.read_only})
        secrets = [self.spec.storage.credentials_secret, self.spec.tracking.credentials_secret]
        stop = ["python", "-m", "terrace.cluster.stop_notice", "--wait-seconds", str(self.grace_seconds - 5)]
        container: Manifest = {
            "name": name,
            "image": self.runtime.image,
            "imagePullPolicy": self.runtime.image_pull_policy,
            "workingDir": self.runtime.working_dir,
            "env": [{"name": key, "value": value} for key, value in self._environment().items()],
            "envFrom": [{"secretRef": {"name": secret}} for secret in dict.fromkeys(secrets) if secret],
            "resources": {"requests": dict(amounts), "limits": dict(amounts)},
            "securityContext": {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "lifecycle": {"preStop": {"exec": {"command": stop}}},
            "volumeMounts": mounts,
        }  # fmt: skip
        if not container["envFrom"]:
            del container["envFrom"]
        return container

    def _environment(self) -> dict[str, str]:
        storage, tracking = self.spec.storage, self.spec.tracking
        values = {
            "HOME": "/tmp", "XDG_CACHE_HOME": "/tmp/cache", "HF_HOME": "/tmp/cache/huggingface", "TMPDIR": "/tmp",
            "PYTHONUNBUFFERED": "1",
            "TERRACE_NAMESPACE": self.namespace, "TERRACE_CURRICULUM": self.curriculum,
            "TERRACE_PROGRESS": progress_name(self.curriculum), "TERRACE_ATTEMPT": str(self.attempt),
            "TERRACE_STOP_FILE": STOP_FILE,
        }  # fmt: skip
        optional = {
            "TERRACE_PROGRESS_PREFIX": progress_prefix(self.spec.recipe, self.index),
            "AWS_ENDPOINT_URL": storage.endpoint_url, "AWS_REGION": storage.region,
            "MLFLOW_TRACKING_URI": tracking.mlflow_uri, "MLFLOW_EXPERIMENT_NAME": tracking.experiment,
        }  # fmt: skip
        values |= {key: value for key, value in optional.items() if value}
        return values | {variable.name: variable.value for variable in self.runtime.env}

    def _template(self, container: Manifest, size: PodSize, role: str, api_token: bool) -> Manifest:
        volumes: list[Manifest] = [
            {"name": "scratch", "emptyDir": {"sizeLimit": self.spec.storage.scratch}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": size.shared_memory}},
            {"name": "recipe", "configMap": {"name": self.recipe_map}},
        ]
        for number, volume in enumerate(self.spec.storage.volumes):
            claim = {"claimName": volume.claim, "readOnly": volume.read_only}
            volumes.append({"name": f"data-{number}", "persistentVolumeClaim": claim})
        spec: Manifest = {
            "serviceAccountName": self.runtime.service_account or trainer_name(self.curriculum),
            "automountServiceAccountToken": api_token,
            "terminationGracePeriodSeconds": self.grace_seconds,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": self.runtime.run_as_user, "runAsGroup": self.runtime.run_as_user,
                "fsGroup": self.runtime.run_as_user, "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "tolerations": self._tolerations(),
            "containers": [container],
            "volumes": volumes,
        }  # fmt: skip
        if self.runtime.image_pull_secrets:
            spec["imagePullSecrets"] = [{"name": name} for name in self.runtime.image_pull_secrets]
        metadata: Manifest = {"labels": self.labels | {"app.kubernetes.io/component": role}}
        if annotations := self._topology(role):
            metadata["annotations"] = annotations
        return {"metadata": metadata, "spec": spec}

    def _tolerations(self) -> list[Manifest]:
        given = [t.model_dump(by_alias=True, exclude_none=True) for t in self.runtime.tolerations]
        taints = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        return given + [
            {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_TOLERATION_SECONDS} for taint in taints
        ]

    def _topology(self, role: str) -> dict[str, str]:
        queue = self.spec.queue
        if queue is None or queue.scheduler != "kueue":
            return {}
        if role == "worker" and queue.topology_required:
            return {"kueue.x-k8s.io/podset-required-topology": queue.topology_required}
        if role == "worker" and queue.topology_preferred:
            return {"kueue.x-k8s.io/podset-preferred-topology": queue.topology_preferred}
        aware = queue.topology_aware or queue.topology_required or queue.topology_preferred
        return {"kueue.x-k8s.io/podset-unconstrained-topology": "true"} if aware else {}
