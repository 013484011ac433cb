"""The typed `status` of a Curriculum: what the operator writes and everybody reads.

Times are RFC 3339 in UTC. Metric values are strings, as Kubernetes APIs avoid floating point in status.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from terrace.cluster.cluster_schema import ClusterModel

Phase = Literal["Pending", "Queued", "Running", "Restarting", "Paused", "Suspended", "Succeeded", "Failed"]
StagePhase = Literal["Pending", "Queued", "Starting", "Running", "Stopping", "BackingOff", "Stopped", "Succeeded", "Failed"]
ConditionType = Literal["Accepted", "QuotaReserved", "Progressing", "Degraded", "Suspended", "Succeeded", "Failed"]
Timestamp = Annotated[str, Field(max_length=32)]
Text = Annotated[str, Field(max_length=1024)]


class StatusModel(ClusterModel):
    """Status of an older or newer operator must still be readable: unknown keys are ignored, values may be replaced."""

    model_config = ConfigDict(extra="ignore", frozen=False, validate_assignment=False)


class Condition(StatusModel):
    type: ConditionType = Field(description="Name of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: Annotated[str, Field(max_length=64)] = Field(description="One word for machines; docs/kubernetes.md explains each.")
    message: Annotated[str, Field(max_length=2048)] = Field("", description="One sentence for people.")
    last_transition_time: Timestamp = Field(description="When `status` last changed.")
    observed_generation: int | None = Field(None, description="Generation of the spec that this speaks of.")


class CheckpointStatus(StatusModel):
    uri: Text = Field("", description="Where it lies.")
    stage: Annotated[str, Field(max_length=63)] = Field("", description="Its stage.")
    step: int = Field(0, description="Optimizer steps done.")
    time: Timestamp | None = Field(None, description="When it was complete.")


class MlflowStatus(StatusModel):
    experiment_id: Annotated[str, Field(max_length=64)] | None = Field(None, description="MLflow experiment.")
    parent_run_id: Annotated[str, Field(max_length=64)] | None = Field(None, description="MLflow run of the curriculum.")


class StageStatus(StatusModel):
    name: Annotated[str, Field(max_length=63)] = Field(description="Name of the stage.")
    phase: StagePhase = Field("Pending", description="Where the stage stands.")
    attempt: int = Field(0, description="Number of the newest attempt; never reused, so that older attempts are told apart.")
    restarts: int = Field(0, description="Restarts after program failures.")
    infra_restarts: int = Field(0, description="Restarts after infrastructure failures.")
    preemptions: int = Field(0, description="Times the queue took the resources back; counts in no budget.")
    ray_job_name: Annotated[str, Field(max_length=63)] | None = Field(None, description="RayJob of the newest attempt.")
    ray_cluster_name: Annotated[str, Field(max_length=63)] | None = Field(None, description="Its RayCluster.")
    spec_hash: Annotated[str, Field(max_length=64)] | None = Field(None, description="Hash of the stage as it was started.")
    recipe_config_map: Annotated[str, Field(max_length=63)] | None = Field(
        None, description="ConfigMap with the recipe as the newest attempt reads it."
    )
    start_time: Timestamp | None = Field(None, description="When the first attempt was created.")
    attempt_time: Timestamp | None = Field(None, description="When the newest attempt was created.")
    admitted_time: Timestamp | None = Field(None, description="When the newest attempt last got its quota.")
    stop_time: Timestamp | None = Field(None, description="When the newest attempt was told to stop.")
    completion_time: Timestamp | None = Field(None, description="When the stage succeeded or failed for good.")
    next_retry_time: Timestamp | None = Field(None, description="Earliest start of the next attempt.")
    step: int = Field(0, description="Optimizer step of the newest report.")
    total_steps: int = Field(0, description="Optimizer steps of the stage.")
    last_report_time: Timestamp | None = Field(None, description="When the operator last saw a new report.")
    checkpoint: CheckpointStatus | None = Field(None, description="Newest complete checkpoint of the stage.")
    mlflow_run_id: Annotated[str, Field(max_length=64)] | None = Field(None, description="MLflow run of the stage.")
    metrics: Annotated[dict[str, Annotated[str, Field(max_length=64)]], Field(max_length=64)] = Field(
        {}, description="Newest metrics, values as text."
    )
    reason: Annotated[str, Field(max_length=64)] | None = Field(None, description="Why the stage is in its phase.")
    message: Annotated[str, Field(max_length=2048)] | None = Field(None, description="The same in a sentence.")


class UsageStatus(StatusModel):
    gpu_hours: Annotated[str, Field(max_length=32)] = Field("0.0", description="GPU hours used.")
    wall_hours: Annotated[str, Field(max_length=32)] = Field("0.0", description="Hours since its start.")
    cost: Annotated[str, Field(max_length=32)] | None = Field(None, description="GPU hours times `limits.pricePerGpuHour`.")


class CurriculumStatus(StatusModel):
    observed_generation: int = Field(0, description="Generation of the spec this status speaks of.")
    phase: Phase = Field("Pending", description="Where the curriculum stands.")
    current_stage: Annotated[str, Field(max_length=255)] | None = Field(
        None, description="Stage that runs or runs next; several, parted by commas, where branches run side by side."
    )
    stages_done: Annotated[str, Field(max_length=16)] = Field("0/0", description="Stages done of all, for example `2/5`.")
    progress: Annotated[str, Field(max_length=32)] = Field("", description="Step of the current stage, for example `500/90000`.")
    restarts: int = Field(0, description="Restarts of all stages, program and infrastructure.")
    allocated_gpus: int = Field(0, description="GPUs that the running attempt holds.")
    queue: Annotated[str, Field(max_length=63)] | None = Field(None, description="Kueue queue.")
    start_time: Timestamp | None = Field(None, description="When the first attempt was created.")
    completion_time: Timestamp | None = Field(None, description="When the curriculum succeeded or failed.")
    last_checkpoint: CheckpointStatus | None = Field(None, description="Newest complete checkpoint of all.")
    mlflow: MlflowStatus | None = Field(None, description="Where the metrics are.")
    usage: UsageStatus | None = Field(None, description="What was used of `spec.limits`; moves on every ten minutes.")
    controller: dict[str, Any] = Field(
        {},
        description="Values of the state machine. The rest of the status is derived from these and from what is seen.",
    )
    conditions: Annotated[list[Condition], Field(max_length=8)] = Field([], description="The conditions, one per type.")
    stages: Annotated[list[StageStatus], Field(max_length=32)] = Field([], description="The stages, in order.")
