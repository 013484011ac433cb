"""What decoding costs beside training in an RL stage, from the recipe alone: copies of the policy, bytes that move, keys and values.

Per iteration the policy goes to its engines. Where ranks hold shards, each rank gathers the float32 masters tensor by tensor; an engine
with weights of its own then gets them in the precision that it computes in. Seconds are bytes / bandwidth at the figures below, which
nothing was measured with; a real link gives less. Decoding is bounded from below by reading the language model's weights (those that a
token meets) once per token of the longest response, at the GPU's memory bandwidth: batches that are large, or long, take more.
"""

from __future__ import annotations

from dataclasses import dataclass

from terrace.families.shapes import ModelShape
from terrace.planner.memory import COMPUTE_BYTES, FP32, Memory
from terrace.planner.parameters import active_parameters, parameter_counts
from terrace.planner.second_models import SHARDED, can_be_divided, copy_bytes, has_copy, overlapped
from terrace.recipe.schema import Gpu, Stage
from terrace.recipe.schema_grpo import GrpoOptions

NETWORK_BYTES_PER_SECOND = 25e9  # between machines, for each GPU: 200 Gbit/s
HOST_BYTES_PER_SECOND = 25e9  # between a GPU and its host: PCIe 4.0 x16, what is left of 32
VLLM_SHARE = {"colocated": 0.5, "separate": 0.9}  # of the GPU's memory (generation.vllm_policy)


@dataclass(frozen=True)
class RolloutPlan:
    engines: int
    copy_bytes: float  # of the policy in an engine; 0: it decodes on the model that trains
    gathered_bytes: float  # that each training rank receives per iteration, from the other ranks
    sent_bytes: float  # that each engine receives per iteration
    sequence_bytes: float  # keys and values of the longest sequence
    room_bytes: float  # for keys and values on a GPU that decodes, beside what else is there at that time
    hand_over_seconds: float  # per iteration, at the bandwidths above
    longest_response_seconds: float  # at least
    always: bool  # the copy is there while the model trains as well
    divided: bool  # by the workers, which decode in step
    on_gpus: bool

    @property
    def reading(self) -> str:
        return "gathering" if self.divided else "reading"

    @property
    def sequences(self) -> int:
        """Longest sequences that a GPU has room for at a time."""
        return max(0, int(self.room_bytes // self.sequence_bytes))

    @property
    def notes(self) -> list[str]:
        when = "always" if self.always else "while it generates"
        copies = f"{_gib(self.copy_bytes)} of weights in each {when}" if self.copy_bytes else "decode on the model that trains, no copy"
        divided = ", divided by the workers, with the largest layer whole (grpo.shard_copy)" if self.divided else ""
        words = [
            f"rollouts: {self.engines} engines, {copies}{divided}; keys and values of a longest sequence {_gib(self.sequence_bytes)}, "
            f"room for {self.sequences} of them on a GPU",
            f"weights to the engines per iteration: {_gib(self.gathered_bytes)} gathered by each rank (float32), {_gib(self.sent_bytes)} "
            f"sent to each engine: {self.hand_over_seconds:.2g} s at {NETWORK_BYTES_PER_SECOND / 1e9:g} GB/s between GPUs and "
            f"{HOST_BYTES_PER_SECOND / 1e9:g} GB/s to a GPU",
            f"the longest response takes at least {self.longest_response_seconds:.3g} s, {self.reading} the weights once per token; how "
            "long all of them take is not part of this plan",
        ]  # fmt: skip
        if self.on_gpus and not self.sequences:
            words.append("no room for one longest sequence on the one GPU of an engine: choose a larger GPU, or shorter responses")
        return words


def settled_copy(stage: Stage, shape: ModelShape, workers: int, memory: Memory, limit: float | None) -> Stage:
    """The stage with `grpo.shard_copy` decided where it leaves that open: whether a whole copy leaves no room for one longest sequence
    within `limit` bytes of a GPU (None: there is no limit), beside weights and optimizer."""
    options = stage.grpo or GrpoOptions()
    if not can_be_divided(stage) or options.shard_copy is not None:
        return stage
    compute = COMPUTE_BYTES[stage.precision]
    beside = memory.weights + memory.optimizer + _sequence_bytes(shape, stage)
    divided = workers > 1 and limit is not None and beside + copy_bytes(shape, compute) > limit
    return stage.model_copy(update={"grpo": options.model_copy(update={"shard_copy": divided})})


def rollout_plan(shape: ModelShape, stage: Stage, gpu: Gpu, workers: int, memory: Memory, usable: float) -> RolloutPlan:
    """The rollouts of a settled `grpo` stage. `memory`: of the update, on a GPU."""
    options = stage.grpo or GrpoOptions()
    size, language = sum(parameter_counts(shape).values()), shape.language
    compute = COMPUTE_BYTES[stage.precision]
    divided = bool(options.shard_copy) and workers > 1
    if options.engine == "vllm":
        copy = float(size * compute)
        room = VLLM_SHARE[options.placement] * usable - copy
    elif options.placement == "separate":
        copy = copy_bytes(shape, compute)
        room = usable - copy
    else:
        copy = copy_bytes(shape, compute, workers if divided else 1) if has_copy(stage) else 0.0
        # A copy that is used while the model trains is part of the update's memory; else weights and optimizer stay beside it.
        room = usable - (memory.total if overlapped(options) else memory.weights + memory.optimizer + copy)
    sequence = _sequence_bytes(shape, stage)
    read = active_parameters(shape)["language"] - (0 if language.tied else language.vocabulary * language.width)
    bandwidth = NETWORK_BYTES_PER_SECOND if divided else gpu.bandwidth_gbs * 1e9
    sent = copy_bytes(shape, compute) / workers if divided else copy
    gathered = FP32 * size * (workers - 1) / workers if stage.parallel.strategy in SHARDED else 0.0
    return RolloutPlan(
        engines=options.rollout_workers if options.placement == "separate" else workers,
        copy_bytes=copy,
        gathered_bytes=gathered,
        sent_bytes=sent,
        sequence_bytes=sequence,
        room_bytes=room,
        hand_over_seconds=gathered / NETWORK_BYTES_PER_SECOND + sent / HOST_BYTES_PER_SECOND,
        longest_response_seconds=options.max_response_tokens * read * compute / bandwidth,
        always=options.placement == "separate" or overlapped(options),
        divided=divided,
        on_gpus=stage.resources.gpus_per_worker > 0,
    )


def _sequence_bytes(shape: ModelShape, stage: Stage) -> float:
    """Keys and values of a longest sequence."""
    language = shape.language
    return 2.0 * language.layers * language.key_heads * language.head_size * COMPUTE_BYTES[stage.precision] * stage.sequence_length


def rollout_values(plan: RolloutPlan) -> dict[str, float]:
    """As JSON."""
    names = ("copy_bytes", "gathered_bytes", "sent_bytes", "sequence_bytes", "room_bytes")
    return {
        "engines": plan.engines, **{name: round(getattr(plan, name)) for name in names}, "sequences_per_gpu": plan.sequences,
        "hand_over_seconds": plan.hand_over_seconds, "longest_response_seconds_at_least": plan.longest_response_seconds,
        "network_bytes_per_second": NETWORK_BYTES_PER_SECOND, "host_bytes_per_second": HOST_BYTES_PER_SECOND,
    }  # fmt: skip


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
