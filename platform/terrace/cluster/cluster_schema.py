"""What a cluster adds to a recipe: the typed `spec` of the Kubernetes resource `Curriculum` beside the recipe itself.

Keys are camelCase in YAML, as in every Kubernetes resource; the recipe inside keeps its own snake_case names, so that one recipe
file and the `recipe:` of a resource are the same text. The CRD's OpenAPI schema is generated from these models
(`terrace.cluster.crd`). A cluster file for `terrace render` is a `ClusterSpec`: everything here except the recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from terrace.recipe.schema import Recipe

SUBDOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
QUALIFIED = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
# Folders as they are compared: no `//`, no `.` or `..`, no `/` at the end; Kubernetes forbids `:` in a mount path.
FOLDER = r"(/\.?[^/:.\s][^/:\s]*)+"
# Labels of 1 to 63 letters; the form of an IP address and S3's reserved beginnings and ends are refused in checks.py
# (docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html). No empty or dotted folders: they would be other keys.
BUCKET = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
RUN_DIRECTORY = rf"^(s3://{BUCKET}(/\.?[^/.\s?#][^/\s?#]*)*/?|{FOLDER})$"
PORT = r":([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
# A host without credentials before it: everybody who may read a Curriculum would read them.
HOST = rf"([A-Za-z0-9]([-A-Za-z0-9_]*[A-Za-z0-9])?(\.[A-Za-z0-9]([-A-Za-z0-9_]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:.]+\])({PORT})?"
ENDPOINT = rf"https?://{HOST}(/[^\s?#]*)?"
# distribution/reference (regexp.go), and the lengths of digest that opencontainers/go-digest checks.
IMAGE = (
    rf"^((([a-zA-Z0-9][a-zA-Z0-9.-]*)|\[[0-9a-fA-F:]+\])({PORT})?/)?[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@(sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}))?$"
)
NO_NUL = r"^[^\x00]*$"  # execve ends a string there: a container with such a value never starts
Cores = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^([0-9]{1,4}(\.[0-9]{1,3})?|[0-9]{1,7}m)$")]
Bytes = Annotated[str, Field(min_length=2, max_length=16, pattern=r"^[0-9]{1,9}(\.[0-9]{1,3})?(M|G|T|Mi|Gi|Ti)$")]
DnsName = Annotated[str, Field(min_length=1, max_length=63, pattern=rf"^{SUBDOMAIN}$")]
LabelKey = Annotated[str, Field(min_length=1, max_length=253, pattern=rf"^({SUBDOMAIN}/)?{QUALIFIED}$")]
LabelValue = Annotated[str, Field(max_length=63, pattern=r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")]


class ClusterModel(BaseModel):
    """Base of the cluster's models: strict, frozen, camelCase keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, alias_generator=to_camel, populate_by_name=True)


class PodSize(ClusterModel):
    """CPU and memory of one pod, used as request and as limit (no overcommit: a training pod that is throttled stalls all)."""

    cpu: Cores = Field("2", description="CPU request, and limit for memory-bound safety; for example `8` or `500m`.")
    memory: Bytes = Field("8Gi", description="Memory request and limit, with a unit: `64Gi`.")
    shared_memory: Bytes = Field("2Gi", description="Size of /dev/shm (Ray's object store and NCCL use it); part of memory, so never more.")


class EnvironmentVariable(ClusterModel):
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        description="Name of the variable; not one that Terrace or KubeRay sets."
    )
    value: Annotated[str, Field(max_length=4096, pattern=NO_NUL)] = Field(
        description="Its value. Secrets belong in `storage.credentialsSecret`."
    )


class Toleration(ClusterModel):
    """A Kubernetes toleration, as in a pod spec."""

    key: LabelKey | None = Field(None, description="Taint key; unset with operator Exists: all.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Whether the value is compared.")
    value: LabelValue | None = Field(None, description="Taint value, with operator Equal only.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="Taint effect; empty: all.")
    toleration_seconds: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = Field(None, description="Only with NoExecute: how long.")


class Runtime(ClusterModel):
    """The pods a stage runs in: image, sizes, placement."""

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=IMAGE)] = Field(
        description="Training image, best with a digest (`repo@sha256:...`)."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="As in a pod spec.")
    image_pull_secrets: Annotated[list[DnsName], Field(max_length=8)] = Field([], description="Names of registry Secrets.")
    ray_version: Annotated[str, Field(max_length=32, pattern=r"^([2-9]|[1-9][0-9]+)\.[0-9]+\.[0-9]+([-+.]?[0-9A-Za-z]+)*$")] = Field(
        "2.60.0", description="Ray version inside the image; KubeRay needs it to choose probes and commands."
    )
    service_account: DnsName | None = Field(
        None,
        description="ServiceAccount of the pods. Unset: the operator makes `<name>-trainer`, allowed to read and patch the one "
        "progress ConfigMap of this Curriculum and nothing else.",
    )
    head: PodSize = Field(PodSize(cpu="2", memory="8Gi"), description="Size of the Ray head pod (no training runs on it).")
    worker: PodSize = Field(PodSize(cpu="8", memory="64Gi", shared_memory="16Gi"), description="Size of one worker pod.")
    submitter: PodSize = Field(
        PodSize(cpu="500m", memory="512Mi", shared_memory="64Mi"),
        description="Size of the small pod that submits the job.",
    )
    workers_per_pod: Annotated[int, Field(ge=1, le=16)] = Field(1, description="Training workers (ranks) that share a pod.")
    gpu_resource: Annotated[str, Field(max_length=253, pattern=rf"^{SUBDOMAIN}/{QUALIFIED}$")] = Field(
        "nvidia.com/gpu", description="Extended resource of one GPU, as the device plugin names it: with a domain."
    )
    node_selector: Annotated[dict[str, LabelValue], Field(max_length=16)] = Field({}, description="For worker pods.")
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = Field([], description="For head and worker pods.")
    env: Annotated[list[EnvironmentVariable], Field(max_length=64)] = Field([], description="For all pods of a stage.")
    working_dir: Annotated[str, Field(min_length=1, max_length=256, pattern=rf"^{FOLDER}$")] = Field(
        "/opt/terrace", description="Folder in the image that holds `jobs/pretrain.py`."
    )
    entrypoint: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=8192, pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")]],
        Field(min_length=1, max_length=16),
    ] = Field(
        ["python", "jobs/pretrain.py"],
        description="Program of a stage and its first arguments. Terrace adds the recipe, --run-dir, --stage and --attempt.",
    )
    run_as_user: Annotated[int, Field(ge=1, le=2_147_483_647)] = Field(1000, description="Numeric user id of the pods; never root.")
    termination_grace_seconds: Annotated[int, Field(ge=10, le=3600)] | None = Field(
        None,
        description="Time a pod has to save a checkpoint when it must go, longer than every stage's preemption grace. Unset: that "
        "plus 30.",
    )


class Queue(ClusterModel):
    """Who waits for quota, in which queue, at which priority, in which topology."""

    scheduler: Literal["kueue", "volcano", "yunikorn"] = Field(
        "kueue",
        description="Whose queue it is. Volcano and YuniKorn need KubeRay with `--batch-scheduler` of that name; what they say of a "
        "job that waits stays on their own objects.",
    )
    name: DnsName = Field(
        description="Kueue: LocalQueue in the namespace of the Curriculum, a name without dots. Else the queue of that scheduler."
    )
    priority_class: DnsName | None = Field(
        None, description="Decides who preempts whom. Kueue: WorkloadPriorityClass; Volcano: PriorityClass; YuniKorn: not to be set."
    )
    topology_required: LabelKey | None = Field(
        None, description="Node label level that all workers must share, for example a rack. Pending until one is free."
    )
    topology_preferred: LabelKey | None = Field(None, description="As topologyRequired, but falls back to wider levels.")
    topology_aware: bool = Field(
        False,
        description="The GPU flavors have a topology: groups without a level then say 'unconstrained' explicitly.",
    )


class Volume(ClusterModel):
    """A PersistentVolumeClaim seen by all pods, for data or for the run directory where there is no object store."""

    claim: DnsName = Field(description="Name of the PersistentVolumeClaim in the same namespace.")
    mount_path: Annotated[str, Field(min_length=1, max_length=256, pattern=rf"^{FOLDER}$")] = Field(
        description="Where it is mounted: a folder of its own, not /tmp (each pod's scratch) or one of the system's."
    )
    read_only: bool = Field(False, description="Mount without write access (training data).")


class ClusterStorage(ClusterModel):
    """Where a curriculum keeps its journal, checkpoints and final weights."""

    uri: Annotated[str, Field(min_length=1, max_length=1024, pattern=RUN_DIRECTORY)] = Field(
        description="Run directory: `s3://bucket/prefix`, or an absolute path inside one of `volumes`. Cannot change later."
    )
    endpoint_url: Annotated[str, Field(max_length=512, pattern=rf"^{ENDPOINT}$")] | None = Field(
        None, description="S3-compatible endpoint, without credentials; unset: AWS."
    )
    region: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9-]+$")] | None = Field(None, description="Region of the bucket.")
    credentials_secret: DnsName | None = Field(
        None,
        description="Secret whose keys become environment variables of the pods (AWS_ACCESS_KEY_ID, ...). The operator "
        "never reads it. Unset: workload identity of the ServiceAccount.",
    )
    volumes: Annotated[list[Volume], Field(max_length=8)] = Field([], description="Claims mounted into every pod.")
    scratch: Bytes = Field("20Gi", description="Size limit of the writable scratch folder of each pod (/tmp and caches).")


class ClusterTracking(ClusterModel):
    """MLflow as the pods reach it; overrides the recipe's `tracking`."""

    mlflow_uri: Annotated[
        str,
        Field(
            min_length=1,
            max_length=512,
            pattern=rf"^({ENDPOINT}|databricks(://\S+)?|(file|sqlite|postgresql|mysql|mssql)(\+[a-z0-9]+)?:\S+)$",
        ),
    ] | None = Field(None, description="Tracking server URI, for example `http://mlflow:5000`.")
    experiment: Annotated[str, Field(min_length=1, max_length=256, pattern=r"\S")] | None = Field(None, description="Experiment name.")
    credentials_secret: DnsName | None = Field(None, description="Secret with MLFLOW_TRACKING_USERNAME and _PASSWORD.")


class FailurePolicy(ClusterModel):
    """What the cluster adds to, or overrides in, the `failure` block of every stage."""

    max_restarts: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        None,
        description="Restarts after program failures, for every stage; unset: the stage's own `failure.max_restarts`.",
    )
    max_infra_restarts: Annotated[int, Field(ge=0, le=10000)] | None = Field(
        None, description="Restarts after infrastructure failures (stall, lost RayJob, node); unset: the stage's own."
    )
    backoff_seconds: Annotated[float, Field(gt=0, le=604_800)] | None = Field(None, description="First delay; doubles with each failure.")
    backoff_cap_seconds: Annotated[float, Field(gt=0, le=604_800)] | None = Field(None, description="Longest delay.")
    stall_timeout_seconds: Annotated[float, Field(ge=30, le=604_800)] | None = Field(
        None,
        description="No new progress report for this long while running: the attempt is replaced (node death looks so). Reports come "
        "every 10 seconds at most, so no less than 30.",
    )
    pre_running_timeout_seconds: Annotated[int, Field(ge=60, le=604_800)] = Field(
        1800,
        description="From admission to the first line of the program: image pulls, GPUs, submitter. Then: replaced.",
    )
    fence_timeout_seconds: Annotated[int, Field(ge=0, le=604_800)] = Field(
        300,
        description="How long a new attempt waits for the old one's pods to be gone. Pods of a dead node stay for ever; "
        "after this the new attempt starts, and the old attempt's number keeps it from writing checkpoints.",
    )


class Limits(ClusterModel):
    """What the curriculum may use in all. At a limit it is suspended with a checkpoint; a higher limit continues it."""

    gpu_hours: Annotated[float, Field(gt=0, le=1e9)] | None = Field(None, description="GPU hours, from quota to release.")
    wall_hours: Annotated[float, Field(gt=0, le=1e6)] | None = Field(None, description="Hours since its start, waiting included.")
    cost: Annotated[float, Field(gt=0, le=1e12)] | None = Field(None, description="GPU hours times `pricePerGpuHour`.")
    price_per_gpu_hour: Annotated[float, Field(gt=0, le=1e6)] | None = Field(None, description="In the currency of `cost`.")


class ClusterSpec(ClusterModel):
    """Everything a Curriculum says besides its recipe."""

    runtime: Runtime = Field(description="Image, sizes and placement of the pods.")
    storage: ClusterStorage = Field(description="Run directory, data volumes, credentials.")
    queue: Queue | None = Field(None, description="Kueue queue; unset: pods are created at once.")
    tracking: ClusterTracking = Field(ClusterTracking(), description="MLflow.")
    failure_policy: FailurePolicy = Field(FailurePolicy(), description="Restarts, backoff, stall detection.")
    limits: Limits | None = Field(None, description="What it may use in all; unset: no limit.")
    suspend: bool = Field(
        False,
        description="True: save a checkpoint, then release every pod and all quota. False again: continue from there.",
    )
    paused: bool = Field(False, description="True: finish the running stage, start no other.")
    cancelled: bool = Field(False, description="True: save a checkpoint, release everything and never start again.")
    resume_token: Annotated[str, Field(min_length=1, max_length=63)] | None = Field(
        None,
        description="Any text. Changing it continues a curriculum that waits at a missed gate or has failed; its current "
        "stage gets its whole budgets again. With rerunFrom it starts over from that stage.",
    )
    rerun_from: Annotated[str, Field(max_length=63)] | None = Field(
        None,
        description="Name of a stage to run again, with all after it, once per value of resumeToken. What the stages had "
        "written is moved aside, not deleted.",
    )


class CurriculumSpec(ClusterSpec):
    """`spec` of a Curriculum: the recipe and its cluster."""

    recipe: Recipe = Field(description="The recipe, the same text as in a recipe file with `extends` resolved.")
