"""What the API server cannot see of a Curriculum: stages against the pods they get, and the pods against Kubernetes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from terrace.cluster.cel_rules import MOST_BYTES, MOST_CORES, OWN_PREFIXES, OWN_VARIABLES, TAKEN, TAKEN_WITH_ALL_INSIDE
from terrace.cluster.cluster_schema import BUCKET, CurriculumSpec, PodSize
from terrace.cluster.manifests import build_rayjob, worker_bounds, worker_pods
from terrace.cluster.pod_rules import amount, pod_problems
from terrace.recipe.errors import dotted
from terrace.recipe.rules_places import named_places
from terrace.recipe.schema import PARTS

MAX_PODS = 5000  # of one attempt; Kubernetes supports 5,000 nodes (kubernetes.io/docs/setup/best-practices/cluster-large)
MAX_BUDGET = {"steps": 1e9, "tokens": 1e16, "samples": 1e13, "epochs": 1e6}
MAX_GPUS_OF_A_POD = 64  # machines of 16 are the largest on the market
MAX_SEQUENCE_LENGTH, MAX_PACKS, MAX_LEARNING_RATE = 10**8, 10**7, 100.0
MAX_GRACE_SECONDS, LEAST_STALL_SECONDS = 3570.0, 30.0  # as of runtime.terminationGraceSeconds and failurePolicy.stallTimeoutSeconds
PROGRAM_FOLDERS = ("/opt/terrace", "/opt", "/opt/terrace/jobs", "/opt/venv")  # of the training image
SECRET_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "storage.credentialsSecret", "AWS_SECRET_ACCESS_KEY": "storage.credentialsSecret",
    "AWS_SESSION_TOKEN": "storage.credentialsSecret", "MLFLOW_TRACKING_USERNAME": "tracking.credentialsSecret",
    "MLFLOW_TRACKING_PASSWORD": "tracking.credentialsSecret", "MLFLOW_TRACKING_TOKEN": "tracking.credentialsSecret",
}  # fmt: skip
# What S3 keeps for itself (docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html).
RESERVED_BUCKET = re.compile(r"[0-9]+(\.[0-9]+){3}|(xn--|sthree-|amzn-s3-demo-).*|.*(-s3alias|--ol-s3|\.mrap|--x-s3|--table-s3)")
LEAST_BYTES, LEAST_CORES = 64 * 2**20, 0.01
NOBODY = {
    "apiVersion": "terrace.dev/v1alpha1",
    "kind": "Curriculum",
    "metadata": {"name": "name", "namespace": "namespace", "uid": "00000000-0000-0000-0000-000000000000"},
}


def cluster_problems(spec: CurriculumSpec) -> list[str]:
    """Everything wrong between recipe and cluster, each with its place and a way out."""
    problems = [*_storage(spec), *_addresses(spec), *_environment(spec), *_sizes(spec), *_policy(spec)]
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
    if gpus > MAX_GPUS_OF_A_POD:
        yield f"{where}: {gpus:g} GPUs in one pod are more than the {MAX_GPUS_OF_A_POD} that any machine has: use more workers"
    if stage.sequence_length > MAX_SEQUENCE_LENGTH:
        yield f"{where}: sequence_length {stage.sequence_length} is more than {MAX_SEQUENCE_LENGTH}, which no model reads"
    if stage.batch.packs > MAX_PACKS:
        yield f"{where}: batch.packs {stage.batch.packs} is more than {MAX_PACKS}: a step would never end"
    for part in PARTS:
        if (trained := getattr(stage.train, part)) is not None and not trained.lr <= MAX_LEARNING_RATE:
            yield f"{where}: train.{part}.lr {trained.lr:g} is more than {MAX_LEARNING_RATE:g}"
    if stage.failure.preemption_grace_seconds > MAX_GRACE_SECONDS:
        yield (
            f"{where}: failure.preemption_grace_seconds {stage.failure.preemption_grace_seconds:g} is more than the "
            f"{MAX_GRACE_SECONDS:g} that a pod gets to end"
        )
    stall = spec.failure_policy.stall_timeout_seconds or stage.failure.stall_timeout_seconds
    if stall < LEAST_STALL_SECONDS:
        yield (
            f"{where}: failure.stall_timeout_seconds {stall:g} is less than {LEAST_STALL_SECONDS:g}: on a cluster reports come every "
            "10 seconds, and every attempt would count as silent"
        )
    if (nvme := stage.parallel.nvme_path) is not None and not _writable(spec, nvme):
        yield f"{where}: parallel.nvme_path {nvme} cannot be written in a pod: mount a volume there, or use a folder of /tmp"
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
        if f"{path}/".startswith(f"{uri}/") and path != uri:
            yield f"storage.volumes[{number}].mountPath: {path} lies in the run directory {uri}: mount the volume beside or above it"
        if path in PROGRAM_FOLDERS and spec.runtime.working_dir == PROGRAM_FOLDERS[0]:
            yield f"storage.volumes[{number}].mountPath: {path} would hide the program in runtime.workingDir: mount the volume elsewhere"
    if uri.startswith("s3://"):
        yield from _bucket("storage.uri", uri)
        return
    above = [volume for volume in volumes if f"{uri}/".startswith(f"{volume.mount_path}/")]
    if not above:
        yield f"storage.uri: {uri} is a path, so one of storage.volumes must be mounted at it or above it"
    elif max(above, key=lambda volume: len(volume.mount_path)).read_only:
        yield f"storage.uri: {uri} lies on a volume with readOnly: the run must be able to write there"


def _bucket(where: str, uri: str) -> Iterator[str]:
    bucket = uri.removeprefix("s3://").split("/")[0]
    if not 3 <= len(bucket) <= 63 or RESERVED_BUCKET.fullmatch(bucket) or not re.fullmatch(BUCKET, bucket):
        yield f"{where}: {bucket!r} is no name of a bucket: 3 to 63 of a-z, 0-9, '-' and '.', no IP address, none that S3 reserves"


def _addresses(spec: CurriculumSpec) -> Iterator[str]:
    """What the recipe reads: in S3, or in the pod. Where a path of the image or of a volume is, only the pod knows."""
    recipe = spec.recipe
    found = {f"recipe.data.sources.{name}.uri": source.uri for name, source in recipe.data.sources.items()}
    found |= {"recipe.tokenizer.path": recipe.tokenizer.path}
    models = ((path, uri) for path, uri in named_places(recipe) if path[0] == "model" or (path[0] == "stages" and path[2] == "model"))
    found |= {f"recipe.{dotted(path)}": uri for path, uri in models}
    for where, uri in found.items():
        scheme, mark, _ = (uri or "").partition("://")
        if mark and scheme == "s3":
            yield from _bucket(where, uri or "")
        elif mark and scheme != "file":
            yield f"{where}: {scheme}:// is not read: use s3:// or a path of the image or of a volume"
    folder = recipe.data.cache_dir
    if folder is not None and not folder.startswith("s3://") and not _writable(spec, folder):
        yield f"recipe.data.cache_dir: {folder} cannot be written in a pod: mount a volume there, or leave it out (the run directory)"


def _writable(spec: CurriculumSpec, path: str) -> bool:
    """Whether a pod may write there: its root file system is read-only, /tmp and volumes are not."""
    above = [volume for volume in spec.storage.volumes if f"{path.rstrip('/')}/".startswith(f"{volume.mount_path}/")]
    nearest = max(above, key=lambda volume: len(volume.mount_path), default=None)
    return f"{path}/".startswith("/tmp/") if nearest is None else not nearest.read_only


def _environment(spec: CurriculumSpec) -> Iterator[str]:
    for number, variable in enumerate(spec.runtime.env):
        if variable.name.startswith(OWN_PREFIXES) or variable.name in OWN_VARIABLES:
            yield (
                f"runtime.env[{number}]: {variable.name} is set by Terrace or KubeRay, Ray Train or the device plugin: leave it out "
                "(storage.endpointUrl, storage.region and tracking set those of S3 and MLflow)"
            )
        secret = next((key for prefix, key in SECRET_VARIABLES.items() if variable.name.startswith(prefix)), None)
        if secret and getattr(spec, secret.split(".")[0]).credentials_secret:
            yield f"runtime.env[{number}]: {variable.name} would win over the one of {secret}: keep one of the two"
    names = [variable.name for variable in spec.runtime.env]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"runtime.env: {name} is given twice: keep one"


def _sizes(spec: CurriculumSpec) -> Iterator[str]:
    for name in ("head", "worker", "submitter"):
        size: PodSize = getattr(spec.runtime, name)
        cpu, memory, shared = (amount(text) or 0.0 for text in (size.cpu, size.memory, size.shared_memory))
        if cpu < LEAST_CORES or memory < LEAST_BYTES or shared < 2**20:
            yield f"runtime.{name}: a pod needs at least 10m of CPU, 64Mi of memory and 1Mi of sharedMemory"
        if cpu > (amount(MOST_CORES) or 0) or memory > (amount(MOST_BYTES) or 0):
            yield f"runtime.{name}: no machine has more than {MOST_CORES} cores or {MOST_BYTES} of memory for one pod"
        if shared > memory:
            yield f"runtime.{name}.sharedMemory: {size.shared_memory} exceeds memory {size.memory}, of which it is a part"
    if (amount(spec.storage.scratch) or 0.0) < LEAST_BYTES:
        yield f"storage.scratch: {spec.storage.scratch} is less than 64Mi: Ray's own files lie there"
    if (amount(spec.storage.scratch) or 0.0) > (amount(MOST_BYTES) or 0):
        yield f"storage.scratch: no machine has more than {MOST_BYTES} of scratch for one pod"
    if "kubernetes.io/" in spec.runtime.gpu_resource or spec.runtime.gpu_resource.startswith("requests."):
        yield f"runtime.gpuResource: {spec.runtime.gpu_resource} is no extended resource of a device plugin"


def _policy(spec: CurriculumSpec) -> Iterator[str]:
    """The delays that are in force for a stage: the cluster's where it says one, else the stage's own."""
    policy, limits, queue = spec.failure_policy, spec.limits, spec.queue
    if queue is not None and queue.scheduler == "kueue" and "." in queue.name:
        yield f"queue.name: {queue.name} is no LocalQueue of Kueue: a name without dots"
    if queue is not None and queue.scheduler != "kueue" and (queue.topology_required or queue.topology_preferred or queue.topology_aware):
        yield "queue.scheduler: topologyRequired, topologyPreferred and topologyAware are Kueue's: leave them out"
    if queue is not None and queue.scheduler == "yunikorn" and queue.priority_class:
        yield "queue.priorityClass: YuniKorn has no priority class of a job: leave it out (its queues have priorities)"
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
