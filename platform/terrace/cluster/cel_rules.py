"""The rules of a Curriculum that span fields, in CEL, so that the API server refuses a wrong resource with a readable message.

They say the same as `recipe/rules.py` says for files, as far as CEL can: what needs another object (a queue, a Secret) or
arithmetic over fields that CEL cannot see (`workers` is a number or a pair) is checked by the operator and shown in the condition
Accepted. Rules are keyed by model, or by `Model.field`. Every rule is bounded by the length limits of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass

from terrace.cluster.cluster_schema import QUALIFIED, SUBDOMAIN


@dataclass(frozen=True)
class Rule:
    rule: str
    message: str
    field_path: str | None = None

    def as_openapi(self) -> dict[str, str]:
        node = {"rule": self.rule, "message": self.message}
        return node | ({"fieldPath": self.field_path} if self.field_path else {})


# `storage.uri` is a volume's folder or lies in it.
INSIDE = "(self.storage.uri == {0}.mountPath || self.storage.uri.startsWith({0}.mountPath + '/'))"
# Folders of each pod that a volume would break: the scratch folder, the recipe, the system's own.
TAKEN = ("/etc", "/root", "/usr", "/usr/local", "/usr/share", "/var", "/var/lib")
TAKEN_WITH_ALL_INSIDE = (
    "/bin", "/boot", "/dev", "/etc/group", "/etc/hostname", "/etc/hosts", "/etc/passwd", "/etc/resolv.conf", "/etc/terrace", "/lib",
    "/lib64", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/local/bin", "/usr/local/lib",
    "/usr/sbin", "/var/run",
)  # fmt: skip
# What Terrace, KubeRay (ray-operator/controllers/ray/utils/constant.go), Ray Train and the device plugin set in a pod or a worker; an
# entry of `runtime.env` would win over it, or be lost.
OWN_VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "CUDA_VISIBLE_DEVICES", "FQ_RAY_IP", "HOME", "HOSTNAME", "LOCAL_RANK",
    "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "NODE_RANK",
    "NVIDIA_VISIBLE_DEVICES", "PYTHONUNBUFFERED", "RANK", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_CLOUD_INSTANCE_ID",
    "RAY_DASHBOARD_ADDRESS", "RAY_GCS_ADDRESS", "RAY_IP", "RAY_NODE_TYPE_NAME", "RAY_PORT", "RAY_REDIS_ADDRESS", "RAY_ROLE",
    "RAY_USE_TLS", "REDIS_PASSWORD", "REDIS_USERNAME", "TMPDIR", "WORLD_SIZE",
)  # fmt: skip
OWN_PREFIXES = ("KUBERAY_", "KUBERNETES_", "RAY_CLUSTER_", "RAY_JOB_", "RAY_USAGE_STATS_", "TERRACE_")
# The largest machines that can be rented have 1,920 cores and 32 TiB.
MOST_CORES, MOST_BYTES = "2048", "64Ti"


def listed(words: tuple[str, ...]) -> str:
    return "[" + ", ".join(f"'{word}'" for word in words) + "]"


def at_least(amount: str, least: str) -> str:
    return f"quantity({amount}).compareTo(quantity({least})) >= 0"


def at_most(amount: str, most: str) -> str:
    return f"quantity({amount}).compareTo(quantity('{most}')) <= 0"


ROOT_RULES = [
    Rule(
        "size(self.metadata.name) <= 30",
        "metadata.name has at most 30 characters: RayJob names `<name>-s<stage>-<attempt>` are limited to 47",
        ".metadata",
    ),
    Rule(
        "self.metadata.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$')",
        "metadata.name begins with a letter and holds only a-z, 0-9 and '-': it becomes part of Service names",
        ".metadata",
    ),
]

MODEL_RULES: dict[str, list[Rule]] = {
    "CurriculumSpec": [
        Rule(
            f"self.storage.uri.startsWith('s3://') || self.storage.volumes.exists(v, {INSIDE.format('v')})",
            "storage.uri is a path, so one of storage.volumes must be mounted at it or above it",
            ".storage.uri",
        ),
        Rule(
            f"!self.storage.volumes.exists(v, {INSIDE.format('v')} && v.readOnly && !self.storage.volumes.exists(w, "
            f"{INSIDE.format('w')} && size(w.mountPath) > size(v.mountPath)))",
            "storage.uri lies on a volume with readOnly: the run must be able to write there",
            ".storage.uri",
        ),
        Rule(
            "!self.storage.volumes.exists(v, v.mountPath.startsWith(self.storage.uri + '/'))",
            "a volume is mounted inside the run directory storage.uri, which is Terrace's own: mount it beside or above",
            ".storage.volumes",
        ),
        Rule(
            "!has(self.rerunFrom) || self.recipe.stages.exists(s, s.name == self.rerunFrom)",
            "rerunFrom must name a stage of the recipe",
            ".rerunFrom",
        ),
        Rule("!has(self.rerunFrom) || has(self.resumeToken)", "rerunFrom needs a resumeToken, so that it acts once", ".rerunFrom"),
        Rule(
            "!has(self.failurePolicy.backoffSeconds) || has(self.failurePolicy.backoffCapSeconds) || "
            "self.recipe.stages.all(s, self.failurePolicy.backoffSeconds <= s.failure.backoff_cap_seconds)",
            "failurePolicy.backoffSeconds exceeds a stage's failure.backoff_cap_seconds: set failurePolicy.backoffCapSeconds too",
            ".failurePolicy.backoffSeconds",
        ),
        Rule(
            "!has(self.failurePolicy.backoffCapSeconds) || has(self.failurePolicy.backoffSeconds) || "
            "self.recipe.stages.all(s, s.failure.backoff_seconds <= self.failurePolicy.backoffCapSeconds)",
            "failurePolicy.backoffCapSeconds is less than a stage's failure.backoff_seconds: set failurePolicy.backoffSeconds too",
            ".failurePolicy.backoffCapSeconds",
        ),
        Rule(
            "!has(oldSelf.cancelled) || !oldSelf.cancelled || (has(self.cancelled) && self.cancelled)",
            "a cancelled Curriculum stays cancelled: make a new one",
            ".cancelled",
        ),
        Rule(
            "!has(self.queue) || !has(self.queue.topologyRequired) || !has(self.queue.topologyPreferred)",
            "queue.topologyRequired and queue.topologyPreferred exclude each other",
            ".queue",
        ),
    ],
    "Recipe": [
        Rule("self.stages.all(s, self.stages.exists_one(t, t.name == s.name))", "stage names must be unique"),
        Rule(
            "self.stages.all(s, s.mixture.weights.all(k, k in self.data.sources))",
            "every source of a mixture must be one of data.sources",
        ),
        Rule(
            "self.stages.all(s, !has(s.start_from) || (s.start_from != s.name && self.stages.exists(t, t.name == s.start_from)))",
            "start_from must name another stage of the recipe",
        ),
        Rule("!has(self.stages[0].start_from)", "the first stage has no earlier stage to start from"),
        Rule(
            "self.stages.size() >= oldSelf.stages.size()",
            "stages cannot be removed: set paused, or make a new Curriculum",
        ),
    ],
    "Stage": [
        Rule(
            "has(self.train.vision) || has(self.train.projector) || has(self.train.language)",
            "at least one part must train: set train.vision, train.projector or train.language",
        ),
        Rule("self.objective != 'grpo' || has(self.grpo)", "objective grpo needs the block `grpo`"),
        Rule(
            "self.objective != 'grpo' || (has(self.rewards) && size(self.rewards) > 0)",
            "objective grpo needs `rewards` for at least one task",
        ),
        Rule(
            "self.precision != 'fp16' || self.resources.gpus_per_worker > 0.0",
            "precision fp16 needs GPUs: set resources.gpus_per_worker, or use bf16 or fp32",
        ),
    ],
    "Budget": [
        Rule(
            "[has(self.steps), has(self.tokens), has(self.samples), has(self.epochs)].filter(given, given).size() == 1",
            "budget needs exactly one of steps, tokens, samples, epochs",
        ),
        Rule(
            "(!has(self.steps) || self.steps <= 1000000000) && (!has(self.tokens) || self.tokens <= 1e16) && "
            "(!has(self.samples) || self.samples <= 10000000000000) && (!has(self.epochs) || self.epochs <= 1e6)",
            "a budget has at most 1e9 steps, 1e16 tokens, 1e13 samples or 1e6 epochs: it would never end",
        ),
    ],
    "PodSize": [
        Rule(at_least("self.cpu", "'10m'"), "a pod needs at least 10m of CPU", ".cpu"),
        Rule(at_least("self.memory", "'64Mi'"), "a pod needs at least 64Mi of memory", ".memory"),
        Rule(at_most("self.cpu", MOST_CORES), f"no machine has more than {MOST_CORES} cores for one pod", ".cpu"),
        Rule(at_most("self.memory", MOST_BYTES), f"no machine has more than {MOST_BYTES} of memory for one pod", ".memory"),
        Rule(
            at_least("self.memory", "self.sharedMemory"),
            "sharedMemory exceeds memory, of which it is a part: the pod would be killed before it is full",
            ".sharedMemory",
        ),
    ],
    # As ValidateTolerations of Kubernetes has it (pkg/apis/core/validation/validation.go).
    "Toleration": [
        Rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds needs effect NoExecute",
            ".tolerationSeconds",
        ),
        Rule(
            "self.operator != 'Exists' || !has(self.value) || self.value == ''",
            "operator Exists (the default here) compares no value: set operator Equal, or leave the value out",
            ".value",
        ),
        Rule("self.operator != 'Equal' || has(self.key)", "operator Equal needs a key", ".key"),
    ],
    "Queue": [
        Rule("self.scheduler != 'kueue' || !self.name.contains('.')", "a LocalQueue of Kueue has a name without dots", ".name"),
        Rule(
            "self.scheduler == 'kueue' || (!has(self.topologyRequired) && !has(self.topologyPreferred) && !self.topologyAware)",
            "topologyRequired, topologyPreferred and topologyAware are Kueue's: leave them out, or set scheduler kueue",
            ".scheduler",
        ),
        Rule(
            "self.scheduler != 'yunikorn' || !has(self.priorityClass)",
            "YuniKorn has no priority class of a job: leave it out (its queues have priorities)",
            ".priorityClass",
        ),
    ],
    "Limits": [
        Rule("has(self.gpuHours) || has(self.wallHours) || has(self.cost)", "limits needs gpuHours, wallHours or cost"),
        Rule("!has(self.cost) || has(self.pricePerGpuHour)", "limits.cost needs pricePerGpuHour", ".cost"),
    ],
    "Pixels": [Rule("self.min <= self.max", "pixels.min must not exceed pixels.max")],
    "Gate": [Rule("has(self.below) != has(self.above)", "a gate needs exactly one of below, above")],
    "Tokenizer": [
        Rule(
            "has(self.path) != has(self.train_vocabulary_size)",
            "tokenizer needs exactly one of path, train_vocabulary_size",
        )
    ],
    "Model": [Rule("has(self.config) || has(self.pretrained)", "model needs config or pretrained")],
    "Parallel": [
        Rule(
            "(self.offload_optimizer != 'nvme' && self.offload_parameters != 'nvme') || has(self.nvme_path)",
            "nvme offload needs parallel.nvme_path",
        )
    ],
    "Failure": [
        Rule(
            "self.backoff_seconds <= self.backoff_cap_seconds",
            "failure.backoff_seconds must not exceed backoff_cap_seconds",
        )
    ],
    "FailurePolicy": [
        Rule(
            "!has(self.backoffSeconds) || !has(self.backoffCapSeconds) || self.backoffSeconds <= self.backoffCapSeconds",
            "failurePolicy.backoffSeconds must not exceed backoffCapSeconds",
        )
    ],
}

FIELD_RULES: dict[str, list[Rule]] = {
    "Recipe.name": [Rule("self == oldSelf", "recipe.name cannot change: make a new Curriculum")],
    "Recipe.stage_order": [Rule("self == oldSelf", "recipe.stage_order cannot change: make a new Curriculum")],
    "Recipe.model": [Rule("self == oldSelf", "recipe.model cannot change: make a new Curriculum")],
    "Recipe.tokenizer": [Rule("self == oldSelf", "recipe.tokenizer cannot change: make a new Curriculum")],
    "Data.seed": [Rule("self == oldSelf", "data.seed cannot change: it is the order of the data")],
    "ClusterStorage.scratch": [
        Rule(at_least("self", "'64Mi'"), "scratch needs at least 64Mi: Ray's own files lie there"),
        Rule(at_most("self", MOST_BYTES), f"no machine has more than {MOST_BYTES} of scratch for one pod"),
    ],
    "PodSize.sharedMemory": [Rule(at_least("self", "'1Mi'"), "sharedMemory needs at least 1Mi")],
    "Runtime.nodeSelector": [
        Rule(
            f"self.all(key, key.matches('^({SUBDOMAIN}/)?{QUALIFIED}$'))".replace("\\.", "[.]"),  # CEL knows no escape of a dot
            "a key is no name of a label: [domain/]name of letters, digits, '-', '_' and '.', the name of at most 63 characters",
        )
    ],
    "Runtime.gpuResource": [
        Rule(
            "!self.contains('kubernetes.io/') && !self.startsWith('requests.')",  # IsExtendedResourceName
            "gpuResource is an extended resource of a device plugin: its domain is not kubernetes.io and begins not with requests.",
        )
    ],
    "Volume.mountPath": [
        Rule(
            f"!(self in {listed(TAKEN)}) && !{listed(tuple(f'{folder}/' for folder in TAKEN_WITH_ALL_INSIDE))}"
            ".exists(taken, (self + '/').startsWith(taken))",
            "this folder is the pod's own (scratch, recipe or system): mount the volume elsewhere, for example at /data",
        )
    ],
    "EnvironmentVariable.name": [
        Rule(
            f"!(self in {listed(OWN_VARIABLES)}) && !{listed(OWN_PREFIXES)}.exists(prefix, self.startsWith(prefix))",
            "this variable is set by Terrace or KubeRay, Ray Train or the device plugin; storage.endpointUrl, storage.region and tracking "
            "set those of S3 and MLflow",
        )
    ],
    "ClusterStorage.uri": [Rule("self == oldSelf", "storage.uri cannot change: the journal and checkpoints lie there")],
}
