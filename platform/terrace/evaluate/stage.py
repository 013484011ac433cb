"""The suites that a recipe names, asked at a stage's end: every worker answers its share, rank 0 judges and writes.

The workers are the stage's own, so a large model's questions are asked on all its GPUs. Batches are cut from the suite
alone: the scores are the same on any number of workers.
"""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import torch

from terrace.errors import TerraceError
from terrace.evaluate.replies import Settings
from terrace.evaluate.run import flat_metrics, judge_and_write, open_suites, worker_replies
from terrace.recipe.schema import Stage
from terrace.worker.collectives import from_rank_zero, gather_objects
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)
Scores = dict[str, dict[str, float]]  # suite label -> score -> value


def evaluate_final(stage: Stage, stage_dir: Path, context: WorkerContext) -> Scores:
    """Scores of `stage_dir/final` on the stage's suites, on every rank; the files go to `stage_dir/evaluation`.

    Every rank calls it, when it has let go of what it trained with: each loads the whole model (bf16 on a GPU: 2 bytes per
    parameter). An error on rank 0 while judging is raised on every rank.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    started, final = time.monotonic(), stage_dir / "final"
    settings = Settings(limit=stage.evaluate.limit, workers=context.world_size, device=context.device)
    suites, sight = open_suites(final, stage.evaluate.suites, settings)
    threads = torch.get_num_threads()
    parts = gather_objects(worker_replies(final, stage.evaluate.suites, settings, context.rank, None, suites), context)
    torch.set_num_threads(threads)
    scores: Scores | str = {}
    if context.rank == 0:
        try:
            scores = _by_suite(flat_metrics(judge_and_write(final, suites, parts, sight, stage_dir / "evaluation", started)))
        except TerraceError as error:
            scores = str(error)
    scores = from_rank_zero(scores, context)
    if isinstance(scores, str):
        raise TerraceError(f"stage {stage.name}: {scores}")
    return scores


def _by_suite(flat: dict[str, float]) -> Scores:
    """`label/score` and `label/category/score` -> label -> the rest."""
    scores: Scores = {}
    for name, value in flat.items():
        label, _, score = name.partition("/")
        scores.setdefault(label, {})[score] = value
    return scores
