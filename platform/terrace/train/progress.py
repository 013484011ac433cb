"""Where a stage stands: its step, its totals, what is left out; and how that comes back from a checkpoint."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from terrace.errors import InputError, TerraceError
from terrace.models.lora import is_adapter
from terrace.objectives.interface import Objective, StageFeed
from terrace.recipe.schema import Stage
from terrace.storage.durable import json_bytes, write_durably
from terrace.storage.run_storage import RunStorage
from terrace.train.checkpoint import FENCE, OBJECTIVE
from terrace.train.finish import StageResult
from terrace.train.restore import CheckpointReader, keep_optimizer_state, newest_complete, previous_checkpoint, resume
from terrace.train.setup import names_of_kept_parts
from terrace.train.step import BatchCounts, NonFinite
from terrace.train.strategies.interface import Strategy
from terrace.train.strategies.shards import ReadTogether
from terrace.worker.collectives import barrier, from_rank_zero
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)

LEFT_OUT = "left_out_steps.json"


class NothingLearned(TerraceError):
    """A stage runs, or ends, without optimizer steps."""


@dataclass
class Progress:
    """Steps count from 1; `step` is the last one done."""

    step: int = 0
    loss: float | None = None
    tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    per_source: dict[str, int] = field(default_factory=dict)
    evaluation_before: dict[str, float] | None = None
    left_out: set[int] = field(default_factory=set)
    skipped_in_a_row: int = 0  # up to this step, since this attempt began

    def advance(self, step: int, counts: BatchCounts, loss: float, seconds: float, skipped: bool) -> None:
        self.step, self.seconds = step, self.seconds + seconds
        self.tokens += counts.tokens
        self.samples += counts.samples
        for source, number in counts.samples_per_source.items():
            self.per_source[source] = self.per_source.get(source, 0) + number
        if skipped:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
        else:
            self.loss = loss
            self.skipped_in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        totals = {key: getattr(self, key) for key in ("tokens", "samples", "seconds", "skipped_steps", "per_source")}
        return {"step": self.step, "loss": self.loss, "totals": totals, "evaluation_before": self.evaluation_before}

    def result(self, after: dict[str, float], unready_prompts: int) -> StageResult:
        """What the stage came to. `after`: its evaluation at the end."""
        return StageResult(
            steps=self.step,
            loss=self.loss,
            evaluation={"before": self.evaluation_before or {}, "after": after},
            unready_prompts=unready_prompts,
            **self.state()["totals"],
        )

    def check_learns(self, stage: Stage, most: int, reason: str) -> None:
        """Raise NothingLearned after `most` steps in a row that made no optimizer step; `reason` is the last one's."""
        if self.skipped_in_a_row >= most:
            raise NothingLearned(
                f"stage {stage.name}: {most} steps in a row, up to step {self.step}, made no optimizer step: {reason}. The weights are "
                "those of before; repair the data, the rewards or the learning rate, then resume"
            )

    def check_learned(self, stage: Stage) -> None:
        """Raise NothingLearned at the end of a stage none of whose steps was an optimizer step."""
        if self.skipped_steps >= self.step:
            what = f"all of its {self.step} steps were skipped" if self.step else "there was no sample for a single step"
            raise NothingLearned(
                f"stage {stage.name} made no optimizer step: {what}. It is not complete: its weights are those it "
                f"began with. Repair the data, the rewards or the learning rate, then `terrace resume RUN --from {stage.name}`"
            )

    def record_nonfinite(self, error: NonFinite, policy: str, stage_dir: Path, context: WorkerContext) -> None:
        """`stop`: raise. `skip`: go on. `rewind`: raise, and leave this step out when the restarted stage comes to it."""
        if context.rank == 0:
            with open(stage_dir / "nonfinite.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": error.step, "samples": error.sample_ids, "policy": policy}) + "\n")
            if policy == "rewind":
                write_durably(stage_dir / LEFT_OUT, json_bytes(sorted(self.left_out | {error.step})))
        barrier(context)
        if policy != "skip":
            raise error
        log.warning("%s; the step is skipped", error)


def next_attempt(checkpoints: Path, context: WorkerContext) -> int:
    """One more than the last attempt that wrote here; rank 0 decides."""
    fence = checkpoints / FENCE
    number = int(json.loads(fence.read_text())["attempt"]) + 1 if context.rank == 0 and fence.is_file() else 1
    return int(from_rank_zero(number, context))


def resume_or_hand_over(
    strategy: Strategy, objective: Objective, feed: StageFeed, stage: Stage, identity: str, stage_dir: Path,
    start_weights: Path | None, context: WorkerContext, storage: RunStorage,
) -> Progress:
    """Load the newest complete checkpoint of the stage, else carry over the optimizer state that the recipe keeps.

    `identity` is the stage's hash. Raises InputError if the checkpoint was made under another one, or if its place in
    the data is not this feed's: what would be continued is then another stage.
    """
    path = newest_complete(stage_dir / "checkpoints", storage, context=context).path
    left_out = set(json.loads((stage_dir / LEFT_OUT).read_text())) if (stage_dir / LEFT_OUT).is_file() else set()
    if path is None:
        kept = names_of_kept_parts(strategy.model, stage)
        if kept and start_weights is not None:
            before = previous_checkpoint(start_weights, storage, context)
            if any(map(is_adapter, kept)):  # the same adapters go on, beside the weights they were trained for
                strategy.load_weights(before.source("weights"))
            fresh = keep_optimizer_state(strategy, before, kept)
            if fresh and context.rank == 0:
                log.warning("optimizer_state: keep: %d tensors start fresh, they did not train before", len(fresh))
        return Progress(left_out=left_out)
    reader = CheckpointReader(path, storage)
    state = reader.state
    if state["stage_hash"] != identity:
        raise InputError(
            f"{path}: the recipe changed what this stage computes since this checkpoint (model, data, optimizer, "
            "budget or a stage before it); use a new run directory, or change the recipe back. Workers, strategy and "
            "checkpoint intervals may change"
        )
    feed.restore(state["data"])
    resume(strategy, reader)
    objective.load(ReadTogether(reader.source(OBJECTIVE), reader.names(OBJECTIVE), context))
    log.info("resumed from %s (step %d, saved by %s)", path, state["step"], state["saved_by"])
    return Progress(
        step=int(state["step"]),
        loss=state["loss"],
        evaluation_before=state["evaluation_before"],
        left_out=left_out,
        **state["totals"],
    )
