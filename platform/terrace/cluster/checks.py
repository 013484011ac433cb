"""What the API server cannot see of a Curriculum: stages against the pods they get, and the pods against Kubernetes. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.cluster.cel_rules import OWN_VARIABLES, TAKEN, TAKEN_WITH_ALL_INSIDE
from terrace.cluster.cluster_schema import CurriculumSpec, PodSize
from terrace.cluster.manifests import build_rayjob, worker_bounds, worker_pods
from terrace.cluster.pod_rules import amount, pod_problems

MAX_PODS = 5000  # of one attempt; Kubernetes supports 5,000 nodes (kubernetes.io/docs/setup/best-practices/cluster-large)
MAX_BUDGET = {"steps": 1e9, "tokens": 1e16, "samples": 1e13, "epochs": 1e6}
LEAST_BYTES, LEAST_CORES = 64 * 2**20, 0.01
NOBODY = {
    "apiVersion": "terrace.dev/v1alpha1",
    "kind": "Curriculum",
    "metadata": {"name": "name", "namespace": "namespace", "uid": "00000000-0000-0000-0000-000000000000"},
}


def cluster_problems(spec: CurriculumSpec) -> list[str]:
    """Everything wrong between recipe and cluster, each with its place and a way out."""
    problems = [*_storage(spec), *_environment(spec), *_sizes(spec), *_policy(spec)]
    for number in range(len(spec.recipe.stages)):
        problems += _stage(spec, number)
    return problems or _pods(spec)


def _stage(spec: CurriculumSpec, number: int) -> Iterator[str]:
    stage, per_pod = spec.recipe.stages[number], spec.runtime.workers_per_pod
    where = f"recipe.stages[{number}] ({stage.name})"
    gpus = stage.resources.gpus_per_worker * per_pod
    if gpus != int(gpus):
        yield (
            f"{where}: {per_pod} workers per pod at {stage.resources.gpus_per_worker:g} GPUs each need {gpus:g} GPUs in a "
            "pod, which is not whole: change runtime.workersPerPod"
        )
    needed = stage.resources.cpus_per_worker * per_pod
    if needed > (amount(spec.runtime.worker.cpu) or 0.0):
        yield f"{where}: {needed:g} CPUs of workers do not fit a pod of {spec.runtime.worker.cpu}: raise runtime.worker.cpu"
    low, high = worker_bounds(stage)
    if low % per_pod or high % per_pod:
        yield f"{where}: {low} to {high} workers do not divide into pods of {per_pod}"
    if worker_pods(stage, spec.runtime)[1] > MAX_PODS:
        yield f"{where}: {worker_pods(stage, spec.runtime)[1]} pods are more than the {MAX_PODS} that a cluster of Kubernetes can hold"
    for unit, most in MAX_BUDGET.items():
        if (given := getattr(stage.budget, unit)) is not None and given > most:
            yield f"{where}: budget.{unit} {given:g} would never end: at most {most:g}"
    grace = spec.runtime.termination_grace_seconds
    if grace is not None and grace <= stage.failure.preemption_grace_seconds:
        yield (
            f"{where}: a pod would be killed after {grace} s while its checkpoint may take failure.preemption_grace_seconds "
            f"{stage.failure.preemption_grace_seconds:g}: raise runtime.terminationGraceSeconds"
        )


def _storage(spec: CurriculumSpec) -> Iterator[str]:
    uri, volumes = spec.storage.uri, spec.storage.volumes
    for number, volume in enumerate(volumes):
        path = volume.mount_path
        if path in TAKEN or any(f"{path}/".startswith(f"{folder}/") for folder in TAKEN_WITH_ALL_INSIDE):
            yield f"storage.volumes[{number}].mountPath: {path} is the pod's own folder: mount the volume elsewhere, for example at /data"
    if uri.startswith("s3://"):
        return
    above = [volume for volume in volumes if f"{uri}/".startswith(f"{volume.mount_path}/")]
    if not above:
        yield f"storage.uri: {uri} is a path, so one of storage.volumes must be mounted at it or above it"
    elif max(above, key=lambda volume: len(volume.mount_path)).read_only:
        yield f"storage.uri: {uri} lies on a volume with readOnly: the run must be able to write there"


def _environment(spec: CurriculumSpec) -> Iterator[str]:
    for number, variable in enumerate(spec.runtime.env):
        if variable.name.startswith("TERRACE_") or variable.name in OWN_VARIABLES:
            yield (
                f"runtime.env[{number}]: {variable.name} is set by Terrace or KubeRay: leave it out (storage.endpointUrl, "
                "storage.region and tracking set those of S3 and MLflow)"
            )
    names = [variable.name for variable in spec.runtime.env]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"runtime.env: {name} is given twice: keep one"


def _sizes(spec: CurriculumSpec) -> Iterator[str]:
    for name in ("head", "worker", "submitter"):
        size: PodSize = getattr(spec.runtime, name)
        cpu, memory, shared = (amount(text) or 0.0 for text in (size.cpu, size.memory, size.shared_memory))
        if cpu < LEAST_CORES or memory < LEAST_BYTES or shared < 2**20:
            yield f"runtime.{name}: a pod needs at least 10m of CPU, 64Mi of memory and 1Mi of sharedMemory"
        if shared > memory:
            yield f"runtime.{name}.sharedMemory: {size.shared_memory} exceeds memory {size.memory}, of which it is a part"
    if (amount(spec.storage.scratch) or 0.0) < LEAST_BYTES:
        yield f"storage.scratch: {spec.storage.scratch} is less than 64Mi: Ray's own files lie there"
    if "kubernetes.io/" in spec.runtime.gpu_resource:
        yield f"runtime.gpuResource: {spec.runtime.gpu_resource} is no extended resource of a device plugin"


def _policy(spec: CurriculumSpec) -> Iterator[str]:
    """The delays that are in force for a stage: the cluster's where it says one, else the stage's own."""
    policy, limits = spec.failure_policy, spec.limits
    if limits is not None and limits.gpu_hours is limits.wall_hours is limits.cost is None:
        yield "limits: needs gpuHours, wallHours or cost"
    if limits is not None and limits.cost is not None and limits.price_per_gpu_hour is None:
        yield "limits.cost: needs limits.pricePerGpuHour"
    for stage in spec.recipe.stages:
        first = stage.failure.backoff_seconds if policy.backoff_seconds is None else policy.backoff_seconds
        cap = stage.failure.backoff_cap_seconds if policy.backoff_cap_seconds is None else policy.backoff_cap_seconds
        if first > cap:
            yield (
                f"failurePolicy: the first delay of stage {stage.name} is {first:g} s and its longest {cap:g} s: set both "
                "backoffSeconds and backoffCapSeconds"
            )


def _pods(spec: CurriculumSpec) -> list[str]:
    """The templates of every stage's pods, as Kubernetes would judge them at their creation."""
    found: dict[str, None] = {}
    for index in range(len(spec.recipe.stages)):
        job = build_rayjob(NOBODY, spec, index, 1, "name-recipe-0000000000")["spec"]
        cluster = job["rayClusterSpec"]
        templates = {"head": cluster["headGroupSpec"]["template"], "worker": cluster["workerGroupSpecs"][0]["template"]}
        templates |= {"submitter": job["submitterPodTemplate"]} if "submitterPodTemplate" in job else {}
        for role, template in templates.items():
            found |= dict.fromkeys(f"the {role} pods could never be created: {text}" for text in pod_problems(template))
    return list(found)
