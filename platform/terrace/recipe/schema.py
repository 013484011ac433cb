"""The typed recipe: everything a curriculum says, with every default in this one file.

A recipe is YAML (see `loading.py`) read into these strict models: unknown keys and wrong types are errors. The models
hold values and their one-field checks; rules that span fields or stages live in `rules.py`. Nothing here imports torch
or ray, so a laptop without either can validate a recipe, and the JSON Schema of `Recipe` is the OpenAPI schema of the
Kubernetes resource.

Words: a *part* is one of vision, projector, language. A *pack* is one training sequence of at most `sequence_length`
tokens, made of whole samples ("segments"). A *batch* is the packs of one optimizer step over all workers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PartName = Literal["vision", "projector", "language"]
PARTS: tuple[PartName, ...] = ("vision", "projector", "language")

SampleKind = Literal[
    "caption",
    "document",
    "text",
    "ocr",
    "grounding",
    "gui",
    "qa",
    "counting",
    "chart",
    "instruction",
    "reasoning",
    "video",
    "preference",
    "prompt",
]

Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Base of every recipe model: unknown keys are refused, values are never silently given another meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# ---------------------------------------------------------------- model


class Initialisation(Strict):
    """Where each part's weights come from: a Hugging Face directory or s3:// URI, or `random`."""

    vision: str = "random"
    projector: str = "random"
    language: str = "random"


class Model(Strict):
    architecture: Literal["qwen2_5_vl", "qwen2_vl"] = Field("qwen2_5_vl", description="A transformers model type.")
    config: dict[str, Any] | None = Field(
        None,
        description="The transformers configuration, every shape field set: `text_config`, `vision_config`, token ids.",
    )
    pretrained: str | None = Field(
        None, description="Hugging Face directory or s3:// URI holding config.json and safetensors."
    )
    init: Initialisation | None = Field(
        None, description="Per-part weights on top of `config`; parts not named start random."
    )
    seed: int = Field(0, ge=0, description="Seed of the random initialisation.")
    attention: Literal["auto", "varlen", "flash_attn", "sdpa_segments", "flex"] = Field(
        "auto",
        description="Attention kernels over the segments of a pack; `auto` picks by capability and logs the reason.",
    )
    stands_in_for: str | None = Field(
        None, description="Says what the published model has instead, where this model only stands in for a part of it."
    )


# ---------------------------------------------------------------- data


class Storage(Strict):
    """How `s3://` URIs are reached. Credentials come from the usual AWS chain, never from the recipe."""

    endpoint_url: str | None = None
    region: str | None = None
    max_attempts: int = Field(
        8, ge=1, le=30, description="Tries of one request before it is an error, with backoff and jitter."
    )
    timeout_seconds: Positive = 60.0


class Source(Strict):
    """One named set of samples: raw rows that `terrace ingest` turns into shards, or shards indexed in place."""

    uri: str = Field(
        description="Folder, file, glob or s3:// URI of shards (tar), JSON Lines, Parquet, images or text."
    )
    kind: SampleKind = "caption"
    format: Literal["auto", "webdataset", "jsonl", "json", "parquet", "image_folder", "text"] = "auto"
    images_root: str | None = Field(
        None, description="Folder that image paths in rows are relative to; default: beside the rows."
    )
    supervise: Literal["auto", "all_text", "assistant"] = Field(
        "auto", description="`auto`: captions and documents on their text, conversations on assistant turns only."
    )
    holdout_samples: int = Field(
        0, ge=0, description="Samples kept out of training for held-out loss, chosen by a seeded hash."
    )
    max_samples: int | None = Field(None, ge=1, description="Cap: only this many samples (a seeded choice) take part.")
    too_long: Literal["refuse", "split", "truncate_text", "reduce_resolution"] = Field(
        "refuse", description="What happens to a sample longer than the stage's sequence: always counted, never silent."
    )
    max_visual_tokens_per_image: int | None = Field(None, ge=1)
    on_damage: Literal["stop", "skip"] = Field(
        "stop", description="Bytes that no longer match the index: stop, or replace."
    )
    task: str | None = Field(None, description="Reward task of an RL source.")


class Data(Strict):
    sources: dict[Name, Source] = Field(min_length=1)
    cache_dir: str | None = Field(None, description="Where ingested shards and indexes lie; default: `<run-dir>/data`.")
    seed: int = Field(0, ge=0, description="Seed of the data order.")
    shard_bytes: int = Field(256 * 2**20, ge=2**16, description="Target size of a shard that ingest writes.")
    max_image_pixels: int = Field(
        64_000_000, ge=784, description="Images with more pixels are refused at ingest (image bombs)."
    )
    storage: Storage = Storage()


class Tokenizer(Strict):
    """A Hugging Face tokenizer directory (a plain string says this too), or a byte-level BPE trained on the data."""

    path: str | None = None
    train_vocabulary_size: int | None = Field(None, ge=320, le=200_000)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


# ---------------------------------------------------------------- stage


class PartTraining(Strict):
    lr: Positive
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Learning rate of layer l is lr * layer_decay^(layers - l) (BEiT, Qwen-VL: 0.95 for the ViT)."
    )
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="At the stage's start, if the part trained before."
    )
    activation_checkpointing: bool = False
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Overrides the optimizer's for this part."
    )


class TrainedParts(Strict):
    """Parts named here train; every other part is frozen."""

    vision: PartTraining | None = None
    projector: PartTraining | None = None
    language: PartTraining | None = None


class Pixels(Strict):
    """Bounds on the pixels of a resized image. Sides are multiples of 28 (14-pixel patches merged 2x2)."""

    min: int = Field(3136, ge=1)
    max: int = Field(1_003_520, ge=1)


class Budget(Strict):
    """Exactly one is given. `tokens` counts sequence positions: steps = tokens / (packs * length), rounded up."""

    steps: Annotated[int, Field(gt=0)] | None = None
    tokens: Positive | None = None
    samples: Annotated[int, Field(gt=0)] | None = None
    epochs: Positive | None = None


class Batch(Strict):
    packs: int = Field(
        8, ge=1, description="Global batch of one optimizer step, in packed sequences, over all workers."
    )


class Optimizer(Strict):
    kind: Literal["adamw"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Positive | None = Field(1.0, description="Global gradient norm limit; null: none.")


class Schedule(Strict):
    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = Field(0.03, description="Share of the steps below 1, steps from 1 on.")
    min_ratio: Share = Field(0.1, description="Final learning rate as a share of the peak.")


class Parallel(Strict):
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = "ddp"
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    reshard_after_forward: bool = Field(
        True, description="FSDP: free gathered parameters between forward and backward."
    )
    hybrid_shard_size: int | None = Field(
        None, ge=1, description="FSDP: shard over this many ranks, replicate over the rest."
    )
    sequence_parallel: int = Field(1, ge=1, description="Ranks that share one pack (Ulysses).")


class Resources(Strict):
    workers: int | tuple[int, int] = Field(1, description="Number of workers, or [min, max] for elastic training.")
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    decode_cpus: Annotated[int, Field(ge=1)] | None = Field(
        None, description="CPUs of the cluster for decoding; default: the rest."
    )


class Checkpoint(Strict):
    every_steps: int | None = Field(None, ge=1, description="Default: only at the stage's end.")
    keep_last: int = Field(2, ge=1)
    keep_every_steps: int | None = Field(None, ge=1)
    best_metric: str | None = None
    asynchronous: bool = True


class Gate(Strict):
    """A bound on a metric at the stage's end, for example `eval/caption/loss` below 2.5."""

    metric: str
    below: float | None = None
    above: float | None = None
    on_miss: Literal["pause", "fail", "continue"] = "pause"


class Evaluate(Strict):
    """Held-out loss per kind (samples kept by `holdout_samples`) before and after the stage, and optional suites."""

    every_steps: int | None = Field(None, ge=1)
    max_samples_per_kind: int = Field(64, ge=1)
    suites: list[str] = []


class DataLoading(Strict):
    window_samples: int = Field(2_000, ge=1, description="Samples that are packed together; position = (window, pack).")
    prefetch_packs: int = Field(8, ge=1, description="Decoded packs kept ready per worker.")
    packs_per_task: int = Field(8, ge=1, description="Packs that one decode task reads, decodes and yields.")
    engine: Literal["ray", "inline"] = Field(
        "ray", description="`inline` decodes in the training process (debugging, torchrun)."
    )
    max_visual_tokens_per_pack: int | None = Field(None, ge=1)


def is_plain_mixture(value: Any) -> bool:
    """Whether a mixture is written as `{source: weight}`: only numbers, or null, which removes a source of the base."""
    if not isinstance(value, dict) or not value or set(value) <= {"temperature"}:
        return False
    return all(
        weight is None or (isinstance(weight, (int, float)) and not isinstance(weight, bool))
        for weight in value.values()
    )


class Mixture(Strict):
    """Written in a recipe as a plain map `{source: weight}`, or in full."""

    weights: dict[Name, Positive] = Field(min_length=1)
    unit: Literal["samples", "tokens"] = "samples"
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Weights become weight * size^temperature (0: as written, 1: proportional to size)."
    )
    epoch_caps: dict[Name, Positive] = Field({}, description="At most this many passes over a source in the stage.")

    @model_validator(mode="before")
    @classmethod
    def _from_plain_map(cls, value: Any) -> Any:
        return {"weights": value} if is_plain_mixture(value) else value


class Failure(Strict):
    """What a stage survives. Preemption counts in neither budget."""

    max_restarts: int = Field(3, ge=0, description="Restarts after a program failure.")
    max_infrastructure_restarts: int = Field(20, ge=0)
    backoff_seconds: Positive = 10.0
    backoff_cap_seconds: Positive = 600.0
    stall_timeout_seconds: Positive = 1800.0
    preemption_grace_seconds: Positive = 60.0
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"


class GrpoOptions(Strict):
    """MORL as published: on-policy, one step per rollout batch, no clip, no KL (MiMo-VL section 3.3)."""

    prompts_per_iteration: int = Field(32, ge=1)
    samples_per_prompt: int = Field(8, ge=2)
    max_response_tokens: int = Field(512, ge=1)
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    updates_per_rollout: int = Field(1, ge=1)
    normalise: Literal["std", "none"] = "std"
    baseline: Literal["mean", "leave_one_out"] = "mean"
    clip_low: Positive | None = None
    clip_high: Positive | None = None
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    entropy_coefficient: float = 0.0
    dynamic_sampling: bool = True
    max_sampling_rounds: int = Field(4, ge=1)
    easy_pool_probability: Share = 0.0
    drop_pass_rate_above: Share | None = None
    engine: Literal["native", "vllm"] = "native"
    placement: Literal["colocated", "separate"] = "colocated"
    max_reward_failure_rate: Share = 0.2
    max_logprob_mismatch: Positive = 0.1


class RewardRule(Strict):
    name: str = Field(description="A registered reward, e.g. counting, grounding, gui_point, visual_reasoning, remote.")
    weight: Positive = 1.0
    options: dict[str, Any] = {}


class Stage(Strict):
    name: Name
    objective: Literal["lm", "grpo", "reward_model"] = "lm"
    start_from: Name | None = Field(
        None, description="The stage whose final weights this one starts from; default: the previous."
    )
    train: TrainedParts
    mixture: Mixture
    sequence_length: int = Field(8192, ge=16)
    pixels: Pixels = Pixels()
    budget: Budget
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    parallel: Parallel = Parallel()
    resources: Resources = Resources()
    checkpoint: Checkpoint = Checkpoint()
    data_loading: DataLoading = DataLoading()
    activation_offload: bool = False
    loss_chunk_tokens: int = Field(1024, ge=1, description="Rows of logits that exist at once in the loss.")
    evaluate: Evaluate = Evaluate()
    gates: list[Gate] = []
    failure: Failure = Failure()
    grpo: GrpoOptions | None = None
    rewards: dict[str, list[RewardRule]] = Field({}, description="Reward rules per task (objective grpo).")
    seed: int = Field(0, ge=0)


class Tracking(Strict):
    uri: str | None = Field(None, description="MLflow tracking URI; default: sqlite in the run directory.")
    experiment: str = "terrace"
    log_every_steps: int = Field(1, ge=1)


class Recipe(Strict):
    name: Name
    description: str = ""
    model: Model
    tokenizer: Tokenizer
    data: Data
    stages: list[Stage] = Field(min_length=1, max_length=32)
    tracking: Tracking = Tracking()
    notes: list[str] = Field([], description="What is assumed, borrowed or stands in, in words.")
