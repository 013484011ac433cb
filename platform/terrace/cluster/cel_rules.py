"""The rules of a Curriculum that span fields, in CEL, so that the API server refuses a wrong resource with a readable message.

They say the same as `recipe/rules.py` says for files, as far as CEL can: what needs another object (a queue, a Secret) or
arithmetic over fields that CEL cannot see (`workers` is a number or a pair) is checked by the operator and shown in the condition
Accepted. Rules are keyed by model, or by `Model.field`. Every rule is bounded by the length limits of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    rule: str
    message: str
    field_path: str | None = None

    def as_openapi(self) -> dict[str, str]:
        node = {"rule": self.rule, "message": self.message}
        return node | ({"fieldPath": self.field_path} if self.field_path else {})


ROOT_RULES = [
    Rule(
        "size(self.metadata.name) <= 30",
        "metadata.name has at most 30 characters: RayJob names `<name>-s<stage>-<attempt>` are limited to 47",
    ),
    Rule(
        "self.metadata.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$')",
        "metadata.name begins with a letter and holds only a-z, 0-9 and '-': it becomes part of Service names",
    ),
]

MODEL_RULES: dict[str, list[Rule]] = {
    "CurriculumSpec": [
        Rule(
            "self.storage.uri.startsWith('s3://') || "
            "(has(self.storage.volumes) && self.storage.volumes.exists(v, self.storage.uri.startsWith(v.mountPath)))",
            "storage.uri is a path, so one of storage.volumes must be mounted above it",
        ),
        Rule(
            "!has(self.rerunFrom) || self.recipe.stages.exists(s, s.name == self.rerunFrom)",
            "rerunFrom must name a stage of the recipe",
        ),
        Rule("!has(self.rerunFrom) || has(self.resumeToken)", "rerunFrom needs a resumeToken, so that it acts once"),
        Rule(
            "!has(oldSelf.cancelled) || !oldSelf.cancelled || (has(self.cancelled) && self.cancelled)",
            "a cancelled Curriculum stays cancelled: make a new one",
        ),
        Rule(
            "!has(self.queue) || !has(self.queue.topologyRequired) || !has(self.queue.topologyPreferred)",
            "queue.topologyRequired and queue.topologyPreferred exclude each other",
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
        )
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
    "Recipe.model": [Rule("self == oldSelf", "recipe.model cannot change: make a new Curriculum")],
    "Recipe.tokenizer": [Rule("self == oldSelf", "recipe.tokenizer cannot change: make a new Curriculum")],
    "Data.seed": [Rule("self == oldSelf", "data.seed cannot change: it is the order of the data")],
    "ClusterStorage.uri": [Rule("self == oldSelf", "storage.uri cannot change: the journal and checkpoints lie there")],
}
