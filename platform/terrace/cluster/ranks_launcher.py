"""The launcher for processes that torchrun or srun started: an attempt is one process per rank, and nothing of Ray.

A stage has at most as many workers as there are ranks; with fewer, the first ones work. Samples are decoded in the training
processes, since Ray's decoders are not there: the packs are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terrace.cluster import attempt_files as files
from terrace.cluster import attempt_outcome as outcomes
from terrace.cluster.attempt import AttemptObservation, LaunchRequest
from terrace.cluster.heartbeat import live_processes
from terrace.cluster.ranks import Ranks, order, ranks_of, store_of
from terrace.errors import InputError
from terrace.recipe.schema import Recipe, Stage
from terrace.storage import mirror
from terrace.storage.run_layout import stage_directory
from terrace.track.follow import last_row

LAST_WORDS_SECONDS = 10.0  # after a rank has failed, the others may still say why before they are ended


class RanksLauncher:
    """In rank 0. `run_stage` is what `ranks_worker.led` has in every rank: a function importable by name, called in new processes."""

    name = "ranks"

    def __init__(self, recipe: Recipe, run_stage: Callable[..., Any], ranks: Ranks | None = None):
        from terrace.cluster.ranks_worker import Attempts

        self._recipe = without_ray(recipe)
        self._ranks = ranks or ranks_of()
        self._attempts: Any = Attempts(self._ranks, run_stage)
        self._launched: dict[tuple[str, int], tuple[int, int]] = {}  # (stage, attempt) -> number of its order, workers
        self._failed: dict[int, float] = {}  # number of its order -> since when a rank has failed
        self._killed: set[int] = set()
        self._orders = 0
        for stage in recipe.stages:
            workers_of(stage, self._ranks.world_size)

    def attach(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir).absolute()

    def launch(self, request: LaunchRequest) -> None:
        key = (request.stage, request.attempt)
        if key in self._launched:
            return
        files.claim_attempt(stage_directory(request.run_dir, request.stage_index, request.stage), request.attempt)
        workers = workers_of(self._recipe.stages[request.stage_index], self._ranks.world_size)
        config = {
            "recipe": self._recipe.model_dump(mode="json"), "stage_index": request.stage_index,
            "run_dir": mirror.place_of(request.run_dir), "attempt": request.attempt,
        }  # fmt: skip
        mirror.flush(request.run_dir)
        self._launched[key] = (self._orders + 1, workers)
        self._order({"kind": "launch", "config": config, "workers": workers})

    def observe(self, stage_index: int, stage: str, attempt: int) -> AttemptObservation:
        folder = stage_directory(self._run_dir, stage_index, stage)
        if (stage, attempt) not in self._launched:
            if result := outcomes.stage_result(folder):
                return AttemptObservation(stage, attempt, "succeeded", result=result)
            return outcomes.outcome(folder, stage, attempt) or outcomes.unknown(folder, stage, attempt)
        ended = self._ended(stage, attempt)
        number, workers = self._launched[stage, attempt]
        if len(ended) < workers:
            self._end_what_cannot_go_on(number, ended)
            row = last_row(folder / "metrics.jsonl")
            step, progress = row["step"] if row else None, outcomes.progress_time(folder)
            return AttemptObservation(stage, attempt, "running", live=True, step=step, progress_at=progress)
        mirror.refresh(self._run_dir)
        if result := outcomes.stage_result(folder):
            return AttemptObservation(stage, attempt, "succeeded", result=result)
        if seen := outcomes.outcome(folder, stage, attempt):
            return seen
        rank, code = next(((rank, code) for rank, code in ended.items() if code), (0, 0))
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        if code:
            message = f"rank {rank} {how} without an outcome"
            return AttemptObservation(stage, attempt, "failed", failure="infrastructure", reason="RankDied", message=message)
        message = "the ranks ended without a result"
        return AttemptObservation(stage, attempt, "failed", failure="program", reason="NoResult", message=message)

    def live_attempts(self) -> list[tuple[str, int]]:
        live = {key for key, (_, workers) in self._launched.items() if len(self._ended(*key)) < workers}
        live |= {(process.stage, process.attempt) for process in live_processes(self._run_dir)}
        return sorted(live)

    def stop(self, stage_index: int, stage: str, attempt: int, reason: str, force: bool) -> None:
        if force:
            if (stage, attempt) in self._launched:
                self._order({"kind": "kill", "order": self._launched[stage, attempt][0]})
        else:
            files.request_stop(stage_directory(self._run_dir, stage_index, stage), attempt, reason)

    def close(self) -> None:
        """The other ranks are sent home when the command ends; what still runs here ends now."""
        self._attempts.kill_all()

    def _order(self, what: dict[str, Any]) -> None:
        self._orders += 1
        order(self._ranks, self._orders, what)
        self._attempts.look()

    def _ended(self, stage: str, attempt: int) -> dict[int, int]:
        """Rank -> exit status of the attempt's processes that have ended."""
        self._attempts.look()
        store = store_of(self._ranks)
        number, workers = self._launched[stage, attempt]
        names = {rank: f"ended/{number}/{rank}" for rank in range(workers)}
        return {rank: int(store.get(name)) for rank, name in names.items() if store.check([name])}

    def _end_what_cannot_go_on(self, number: int, ended: dict[int, int]) -> None:
        """A rank that died leaves the others in a collective that nobody answers: after a moment they are ended."""
        if any(ended.values()):
            since = self._failed.setdefault(number, time.monotonic())
            if time.monotonic() - since > LAST_WORDS_SECONDS and number not in self._killed:
                self._killed.add(number)
                self._order({"kind": "kill", "order": number})


def workers_of(stage: Stage, world_size: int) -> int:
    """How many of the ranks the stage's workers are: the most that its packs can be dealt to. Raises InputError for too few ranks."""
    asked = stage.resources.workers
    least, most = (asked, asked) if isinstance(asked, int) else asked
    if least > world_size:
        raise InputError(
            f"stage {stage.name}: resources.workers is {least}, and the number of ranks that were started is {world_size}: start {least},"
            f" or set stages.{stage.name}.resources.workers={world_size}"
        )
    ring = stage.parallel.sequence_parallel
    dealt = [count for count in range(least, min(most, world_size) + 1) if count % ring == 0 and stage.batch.packs % (count // ring) == 0]
    return max(dealt)  # the least of them is dealt evenly: a recipe without that is not valid


def without_ray(recipe: Recipe) -> Recipe:
    """The recipe with decoding in the training processes. Raises InputError for what only Ray can place."""
    stages = []
    for index, stage in enumerate(recipe.stages):
        if stage.rollout_workers:
            raise InputError(f"stages.{index}.grpo.placement: separate rollout workers are placed by Ray; use --launcher local or ray")
        loading = stage.data_loading.model_copy(update={"engine": "inline"})
        stages.append(stage.model_copy(update={"data_loading": loading}))
    return recipe.model_copy(update={"stages": stages})
