"""The typed recipe: everything a curriculum says, with every default here and in `schema_inputs.py`.

A recipe is YAML (see `loading.py`) read into these strict models: unknown keys and wrong types are errors. The models
hold values and their one-field checks; rules that span fields or stages live in `rules.py`. Nothing here imports torch
or ray, so a laptop without either can validate a recipe, and the JSON Schema of `Recipe` is the OpenAPI schema of the
Kubernetes resource.

Words: a *part* is one of vision, projector, language. A *pack* is one training sequence of at most `sequence_length`
tokens, made of whole samples ("segments"). A *batch* is the packs of one optimizer step over all workers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from terrace.recipe.objectives import ObjectiveName
from terrace.recipe.schema_changes import ModelChanges
from terrace.recipe.schema_grpo import EnvironmentRule, GrpoOptions, RewardRule
from terrace.recipe.schema_heads import HeadsTraining, MedusaOptions, MtpOptions
from terrace.recipe.schema_inputs import (
    PARTS,
    Batch,
    Data,
    Mixture,
    Name,
    PartName,
    Pixels,
    Positive,
    SampleKind,
    Share,
    Source,
    Storage,
    Strict,
    Tokenizer,
    Weight,
)
from terrace.recipe.schema_mlm import MlmOptions
from terrace.recipe.schema_model import Initialisation, Model
from terrace.recipe.schema_optimizer import Optimizer, Schedule, WeightAverage
from terrace.recipe.schema_pairs import MatchingOptions, PairOptions
from terrace.recipe.schema_preference import DpoOptions, KtoOptions, MpoOptions, OrpoOptions, SimpoOptions
from terrace.recipe.schema_recaption import Recaption
from terrace.recipe.schema_training import PartTraining
from terrace.recipe.schema_views import (
    PUBLISHED_VIEWS,
    VIEW_OPTIONS,
    ByolOptions,
    CpcOptions,
    DinoOptions,
    InstanceOptions,
    MocoOptions,
    Projector,
    SimclrOptions,
    SimsiamOptions,
    SwavOptions,
    View,
)

# Names that readers of a recipe import from here, wherever in the schema they are defined.
__all__ = ["PARTS", "Initialisation", "PartName", "Recipe", "SampleKind", "Source", "Stage", "Storage"]


# ---------------------------------------------------------------- stage


class TrainedParts(Strict):
    """Parts named here train; every other part is frozen."""

    vision: PartTraining | None = Field(None, description="How the vision tower trains; unset: frozen.")
    projector: PartTraining | None = Field(None, description="How the projector trains; unset: frozen.")
    language: PartTraining | None = Field(None, description="How the language model trains; unset: frozen.")
    heads: HeadsTraining | None = Field(
        None, description="How heads beside the model train: of further tokens (mtp, medusa), behind the tower (objectives over views)."
    )


class Change(Strict):
    """What differs from a step of the stage on; what is not given stays as it was."""

    step: int = Field(ge=1, description="Steps of the stage that are done before: the change holds from the next one on.")
    pixels: Pixels | None = Field(None, description="Bounds on the size of images from here on.")
    weights: dict[Name, Weight] = Field({}, description="New weights of sources of the mixture; 0 leaves one out.")


class Budget(Strict):
    """Exactly one is given. `tokens` counts sequence positions: steps = tokens / (packs * length), rounded up."""

    steps: Annotated[int, Field(gt=0)] | None = Field(None, description="Length of the stage in optimizer steps.")
    tokens: Positive | None = Field(None, description="Length of the stage in sequence positions; steps are derived and rounded up.")
    samples: Annotated[int, Field(gt=0)] | None = Field(None, description="Length of the stage in samples.")
    epochs: Positive | None = Field(None, description="Length of the stage in passes over the mixture.")


class Parallel(Strict):
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp"] = Field(
        "ddp", description="How parameters, gradients and optimizer states are spread over the workers."
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="Where ZeRO keeps optimizer states between steps.")
    offload_parameters: Literal["none", "cpu", "nvme"] = Field("none", description="Where ZeRO-3 keeps parameters between uses.")
    nvme_path: str | None = Field(None, description="Local folder for `nvme` offload.")
    reshard_after_forward: bool = Field(True, description="FSDP: free gathered parameters between forward and backward.")
    hybrid_shard_size: int | None = Field(None, ge=1, description="FSDP: shard over this many ranks, replicate over the rest.")
    sequence_parallel: int = Field(1, ge=1, description="Ranks that share one pack.")
    sequence_exchange: Literal["heads", "ring"] = Field(
        "heads", description="How they attend: all-to-all over heads (Ulysses), or keys and values around a ring, on any number of ranks."
    )
    reduce_every_pack: bool | None = Field(
        None,
        description="FSDP: reduce gradients after every pack instead of keeping whole ones until a step's last. Default: where those would "
        "not fit on the GPU.",
    )
    experts: int = Field(1, ge=1, description="ddp: ranks that share the experts of a mixture; each holds its part, and tokens travel.")
    compile: bool = Field(
        False, description="Run transformer blocks through torch.compile. Needs a C++ compiler on CPU, Triton on CUDA; same losses."
    )

    @property
    def on_host(self) -> bool:
        """Whether FSDP's shards lie in the machine's memory between uses."""
        return "cpu" in (self.offload_parameters, self.offload_optimizer)


class Resources(Strict):
    workers: int | tuple[int, int] = Field(1, description="Number of workers, or [min, max] for elastic training.")
    gpus_per_worker: Annotated[float, Field(ge=0)] = Field(0, description="GPUs of one worker; 0 trains on CPU.")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1, description="CPUs of one worker.")
    decode_cpus: Annotated[int, Field(ge=1)] | None = Field(None, description="CPUs of the cluster for decoding; default: the rest.")


class Checkpoint(Strict):
    every_steps: int | None = Field(None, ge=1, description="Default: only at the stage's end.")
    keep_last: int = Field(2, ge=1, description="Newest checkpoints that stay.")
    keep_every_steps: int | None = Field(None, ge=1, description="Checkpoints at multiples of this step stay as well.")
    best_metric: str | None = Field(
        None, description="Also keep the checkpoint at which this was best, named as in gates: `eval/caption/loss`, `train/loss`."
    )
    best_is: Literal["lowest", "highest"] = Field("lowest", description="Which value of `best_metric` is the best.")
    asynchronous: bool = Field(True, description="Write while training goes on.")


class Gate(Strict):
    """A bound on a metric at the stage's end, for example `eval/caption/loss` below 2.5."""

    metric: str = Field(description="Metric at the stage's end, for example `eval/caption/loss`.")
    below: float | None = Field(None, description="The metric must be below this.")
    above: float | None = Field(None, description="The metric must be above this.")
    on_miss: Literal["pause", "fail", "continue"] = Field(
        "pause", description="What happens otherwise: pause the curriculum, fail it, or continue and say so."
    )


class Evaluate(Strict):
    """Held-out loss per kind (samples kept by `holdout_samples`) before and after the stage, and optional suites."""

    every_steps: int | None = Field(None, ge=1, description="Also evaluate every so many steps; default: before and after the stage.")
    max_samples_per_kind: int = Field(64, ge=1, description="Held-out samples per kind at most.")
    suites: list[str] = Field(
        [], description="Suites asked at the stage's end, each `kind:path` as in `terrace evaluate`; a score is `eval/kind:name/score`."
    )
    limit: int | None = Field(None, ge=1, description="Only the first so many questions of each suite.")


class DataLoading(Strict):
    window_samples: int | None = Field(None, ge=1, description="Samples packed together; default: 2,000, or half the sequence length.")
    prefetch_packs: int = Field(8, ge=1, description="Decoded packs kept ready per worker.")
    packs_per_task: int = Field(8, ge=1, description="Packs that one decode task reads, decodes and yields.")
    engine: Literal["ray", "inline"] = Field(
        "ray", description="`inline` decodes in a thread of the training process (small pictures, debugging, torchrun)."
    )
    max_visual_tokens_per_pack: int | None = Field(None, ge=1, description="Bound on the visual tokens of one pack (vision memory).")


class Failure(Strict):
    """What a stage survives. Preemption counts in neither budget."""

    max_restarts: int = Field(3, ge=0, description="Restarts after a program failure.")
    max_infrastructure_restarts: int = Field(20, ge=0, description="Restarts after a stall, a lost node or a lost job.")
    backoff_seconds: Positive = Field(10.0, description="Delay before the first restart; doubles with each further failure.")
    backoff_cap_seconds: Positive = Field(600.0, description="Longest delay before a restart.")
    stall_timeout_seconds: Positive = Field(1800.0, description="No progress for this long while running: the attempt is replaced.")
    hang_timeout_seconds: Positive | None = Field(
        None,
        description="No progress inside a step for this long: every worker writes its stacks and ends. Default: half the stall timeout.",
    )
    preemption_grace_seconds: Positive = Field(60.0, description="Time to save a checkpoint when told to stop.")
    on_nonfinite: Literal["stop", "skip", "rewind"] = Field("stop", description="What a non-finite loss or gradient does.")


class Profile(Strict):
    steps: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="Steps (from 1) of which each worker writes a torch profiler trace to the stage's `profile/`."
    )


class Stage(Strict):
    name: Name = Field(description="Name of the stage, unique in the recipe.")
    objective: ObjectiveName = Field("lm", description="What a step optimises.")
    start_from: Name | None = Field(None, description="The stage whose final weights this one starts from; default: the previous.")
    model: Model | None = Field(
        None, description="Another model from this stage on; its `init` may take parts of earlier stages (`stage:NAME`). Unset: that of the"
        " stage it starts from.",
    )  # fmt: skip
    after: list[Name] = Field([], max_length=8, description="With `stage_order: graph`: stages to wait for, besides `start_from`.")
    train: TrainedParts = Field(description="The parts that train and how; every other part is frozen.")
    model_changes: ModelChanges | None = Field(None, description="What becomes of the model before the stage begins.")
    mixture: Mixture = Field(description="The sources and their shares.")
    sequence_length: int = Field(8192, ge=16, description="Tokens of one pack.")
    pixels: Pixels = Field(Pixels(), description="Bounds on the size of images.")
    budget: Budget = Field(description="Length of the stage; exactly one field is given.")
    changes: list[Change] = Field(
        [], max_length=32, description="Resolution and mixture that change inside the stage, at given steps. Budget in steps or tokens."
    )
    batch: Batch = Field(Batch(), description="Global batch of one optimizer step.")
    optimizer: Optimizer = Field(Optimizer(), description="Optimizer settings.")
    schedule: Schedule = Field(Schedule(), description="Learning-rate schedule.")
    ema: WeightAverage | None = Field(None, description="A running average of the trained weights, in checkpoints; unset: none.")
    gradient_noise: bool = Field(False, description="Measure the gradient noise scale in every step with two or more packs per worker.")
    precision: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="Number format of the forward and backward pass.")
    final_precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Number format of the weights in `final/`; `auto`: float32 where another stage follows, otherwise `precision`."
    )
    parallel: Parallel = Field(Parallel(), description="Distribution over workers.")
    resources: Resources = Field(Resources(), description="Workers, GPUs and CPUs.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="When checkpoints are written and which stay.")
    data_loading: DataLoading = Field(DataLoading(), description="Packing window and prefetch.")
    frozen_activation_checkpointing: bool = Field(
        False, description="Recompute the activations of frozen parts that gradients pass through."
    )
    activation_offload: bool = Field(False, description="Keep activations in host memory between forward and backward.")
    loss_chunk_tokens: int = Field(1024, ge=1, description="Rows of logits that exist at once in the loss.")
    expert_balance: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Weight of the loss that spreads tokens over a mixture of experts, where the language model trains; default: the "
        "model configuration's.",
    )
    z_loss: float = Field(
        0.0, ge=0, description="Weight of log²Z, the square of the logits' log-sum-exp, in the loss of each target (objective lm)."
    )
    evaluate: Evaluate = Field(Evaluate(), description="Held-out loss and suites.")
    gates: list[Gate] = Field([], description="Bounds on metrics that decide whether the next stage starts.")
    failure: Failure = Field(Failure(), description="What the stage survives.")
    profile: Profile = Field(Profile(), description="Steps to trace.")
    grpo: GrpoOptions | None = Field(None, description="Options of the objective grpo.")
    pairs: PairOptions | None = Field(None, description="Options of the objectives clip and siglip.")
    matching: MatchingOptions | None = Field(None, description="Options of the objective matching.")
    mlm: MlmOptions | None = Field(None, description="Options of the objective mlm.")
    mtp: MtpOptions | None = Field(None, description="Options of the objective mtp.")
    medusa: MedusaOptions | None = Field(None, description="Options of the objective medusa.")
    dpo: DpoOptions | None = Field(None, description="Options of the objective dpo.")
    mpo: MpoOptions | None = Field(None, description="Options of the objective mpo.")
    kto: KtoOptions | None = Field(None, description="Options of the objective kto.")
    orpo: OrpoOptions | None = Field(None, description="Options of the objective orpo.")
    simpo: SimpoOptions | None = Field(None, description="Options of the objective simpo.")
    views: list[View] = Field(
        [], max_length=8, description="Views of a picture (objectives over views; mae: one, or none); default: as published."
    )
    simclr: SimclrOptions | None = Field(None, description="Options of the objective simclr.")
    moco: MocoOptions | None = Field(None, description="Options of the objective moco.")
    byol: ByolOptions | None = Field(None, description="Options of the objective byol.")
    simsiam: SimsiamOptions | None = Field(None, description="Options of the objective simsiam.")
    dino: DinoOptions | None = Field(None, description="Options of the objective dino.")
    swav: SwavOptions | None = Field(None, description="Options of the objective swav.")
    instance_discrimination: InstanceOptions | None = Field(None, description="Options of the objective instance_discrimination.")
    cpc: CpcOptions | None = Field(None, description="Options of the objective cpc.")
    rewards: dict[str, list[RewardRule]] = Field({}, description="Reward rules per task (objective grpo).")
    environment: dict[str, EnvironmentRule] = Field({}, description="What answers back, per task (objective grpo).")
    seed: int = Field(0, ge=0, description="Seed of the stage's own randomness.")

    @property
    def head_kind(self) -> tuple[Literal["mtp", "medusa"], int] | None:
        """What heads the stage trains and how many; None where it trains none."""
        if self.train.heads is None or self.view_options is not None:
            return None
        if self.objective == "medusa":
            return "medusa", (self.medusa or MedusaOptions()).heads
        return "mtp", (self.mtp or MtpOptions()).depth

    @property
    def longest_conversation(self) -> int:
        """Tokens behind a prompt at most, of objective grpo: one response, or the answers and observations of several turns."""
        answer = (self.grpo or GrpoOptions()).max_response_tokens
        talks = [rule.turns * answer + (rule.turns - 1) * rule.max_observation_tokens for rule in self.environment.values()]
        return max([answer, *talks])

    @property
    def view_options(self) -> Projector | None:
        """Options of the stage's objective over views; None where it has another one."""
        kind = VIEW_OPTIONS.get(self.objective)
        return None if kind is None else getattr(self, self.objective) or kind()

    @property
    def planned_views(self) -> list[View]:
        """The views of a picture; none under objectives that compare none."""
        return self.views or PUBLISHED_VIEWS.get(self.objective, [])

    @property
    def rollout_workers(self) -> int:
        """Workers that only generate (`placement: separate`), beside the training workers."""
        return self.grpo.rollout_workers if self.grpo is not None and self.grpo.placement == "separate" else 0


class Tracking(Strict):
    uri: str | None = Field(None, description="MLflow tracking URI; default: sqlite in the run directory.")
    experiment: str = Field("terrace", description="MLflow experiment, and the project of trackers beside it.")
    also: list[Literal["tensorboard", "wandb", "swanlab"]] = Field(
        [],
        description="Trackers beside MLflow, each through its own client, with files in the run directory: `tensorboard`, `wandb`,"
        " `swanlab` (the last two offline unless `WANDB_MODE` or `SWANLAB_MODE` says otherwise).",
    )
    system_metrics: bool = Field(
        False, description="Log what the controller's machine does (CPU, memory, disk, network, GPUs) by MLflow's own monitor."
    )
    log_every_steps: int = Field(1, ge=1, description="Log step metrics every so many steps.")


class Gpu(Strict):
    """A GPU that the planner's own table does not have, or has with other figures."""

    memory_gib: Positive = Field(description="Memory of one GPU in GiB (2^30 bytes), as its driver reports it.")
    bf16_tflops: Positive = Field(description="Dense bfloat16 matrix throughput of one GPU in TFLOP/s (without sparsity).")
    bandwidth_gbs: Positive = Field(1000.0, description="Memory bandwidth in GB/s.")
    price_per_hour: Positive | None = Field(None, description="Price of one GPU for one hour; default: the plan's.")
    source: str = Field("recipe", description="Where the figures come from.")


class Planning(Strict):
    """What `terrace plan` assumes where the recipe alone does not say it. Never changes what a run computes
    (`memory_margin` also decides when FSDP reduces gradients, where `parallel.reduce_every_pack` leaves it open)."""

    gpu: str = Field("h100-80gb", description="GPU of the plan, from the planner's table or `gpus`.")
    gpus: dict[Name, Gpu] = Field({}, description="Further GPUs by name.")
    mfu: Annotated[float, Field(gt=0, le=1)] = Field(
        0.4, description="Model FLOPs utilisation: share of the GPU's peak that training reaches."
    )
    price_per_gpu_hour: Positive = Field(2.5, description="Price of one GPU for one hour, in any currency.")
    visual_token_share: Share = Field(
        0.5, description="Share of visual tokens in the packs of sources with images, until an index tells it."
    )
    tokens_per_sample: Positive = Field(512.0, description="Mean tokens of a sample, until an index tells it.")
    source_tokens_per_sample: dict[Name, Positive] = Field({}, description="Mean tokens of a sample, for single sources.")
    bytes_per_visual_token: Positive = Field(
        400.0, description="Compressed image bytes per visual token (28 x 28 pixels), until an index tells it."
    )
    memory_margin: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.08, description="Share of a GPU's memory left to the CUDA context, NCCL and fragmentation."
    )


class Recipe(Strict):
    name: Name = Field(description="Name of the curriculum in reports and MLflow. Cannot change later.")
    description: str = Field("", description="What the curriculum is for.")
    model: Model = Field(description="The model of every stage up to one with a `model` of its own. Cannot change later.")
    tokenizer: Tokenizer = Field(description="The tokenizer. Cannot change later.")
    data: Data = Field(description="The sources of samples.")
    stages: list[Stage] = Field(min_length=1, max_length=32, description="The stages, in the order they run.")
    stage_order: Literal["sequence", "graph"] = Field(
        "sequence", description="`graph`: a stage waits only for `start_from` and `after`, and on Kubernetes branches run side by side."
    )
    recaption: dict[Name, Recaption] = Field({}, description="What `terrace recaption` makes of sources, by name; a run does not read it.")
    tracking: Tracking = Field(Tracking(), description="Where metrics go.")
    planning: Planning = Field(Planning(), description="Assumptions of `terrace plan`.")
    notes: list[str] = Field([], description="What is assumed, borrowed or stands in, in words.")
