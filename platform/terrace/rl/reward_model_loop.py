"""A reward-model stage (`objective: reward_model`): Bradley-Terry on preference rows, with the training engine's parts.

A batch is `batch.packs` pairs over all workers. Files, events and resuming are those of the other stages; the
evaluation before and after is the held-out loss and accuracy (share of pairs whose chosen answer scores higher).
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from terrace.data.tokenizer import load_tokenizer
from terrace.errors import Preempted
from terrace.models.attention import choose_backend
from terrace.models.build import model_config
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.reward_model import preference_objective
from terrace.recipe.loading import recipe_hash, stage_hash
from terrace.recipe.schema import Recipe
from terrace.rl.pairs import Pair, pack_pairs, pair_batch
from terrace.rl.prompts import PairReader, PromptOrder, held_out
from terrace.train.checkpoint import CheckpointWriter, json_bytes, write_durably
from terrace.train.collectives import barrier, gather_rows
from terrace.train.context import WorkerContext
from terrace.train.finish import export_final
from terrace.train.loop import Observer, StageResult, notifier
from terrace.train.metrics import MetricsLog
from terrace.train.optimizer import parameter_groups, part_learning_rates, schedule_factor
from terrace.train.precision import DTYPES
from terrace.train.progress import next_attempt, resume_or_hand_over
from terrace.train.setup import prepare_strategy
from terrace.train.step import BatchCounts, NonFinite, seed_step
from terrace.train.watchdog import Watchdog, hang_folder, hang_timeout_seconds


def train_reward_model_stage(
    recipe: Recipe,
    stage_index: int,
    prepared: Any,
    stage_dir: Path,
    start_weights: Path | None,
    context: WorkerContext,
    observers: Sequence[Observer] = (),
    attempt: int | None = None,
) -> StageResult:
    """Train a reward model to the stage's end, or go on where it stopped. Done already: return its result."""
    stage = recipe.stages[stage_index]
    result_file = stage_dir / "result.json"
    if result_file.is_file():
        return StageResult(**json.loads(result_file.read_text()))
    notify = notifier(observers, context)
    attempt = next_attempt(stage_dir / "checkpoints", context) if attempt is None else attempt
    with Watchdog(hang_folder(stage_dir, attempt), hang_timeout_seconds(stage), context, stage.name) as watchdog:
        result = _train_and_export(recipe, stage_index, prepared, stage_dir, start_weights, context, notify, attempt, watchdog)
    if context.rank == 0:
        write_durably(result_file, json_bytes(result))
    barrier(context)
    notify("finished", result)
    return StageResult(**result)


def _train_and_export(
    recipe: Recipe,
    stage_index: int,
    prepared: Any,
    stage_dir: Path,
    start_weights: Path | None,
    context: WorkerContext,
    notify: Observer,
    attempt: int,
    watchdog: Watchdog,
) -> dict[str, Any]:
    """The stage up to its Hugging Face directory; the values of its result."""
    stage = recipe.stages[stage_index]
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    config = model_config(recipe.model, tokenizer)
    order = PromptOrder(recipe, stage_index, prepared, draws_per_step=stage.batch.packs, reserved_tokens=0)
    reader = PairReader(recipe, stage_index, prepared, tokenizer)
    strategy = prepare_strategy(recipe, stage, config, context, preference_objective(), start_weights)
    backend, _ = choose_backend(recipe.model.attention, torch.device(context.device).type, stage.precision)
    use_shared_prompt_attention(strategy.model, backend)
    groups = parameter_groups(strategy.model, stage)
    writer = CheckpointWriter(stage_dir / "checkpoints", stage.checkpoint, context, attempt)
    barrier(context)
    identity = stage_hash(recipe, stage_index)
    place = SimpleNamespace(state=lambda _step: order.state(), restore=order.restore)
    progress = resume_or_hand_over(strategy, place, stage, identity, stage_dir, start_weights, context)
    evaluation = held_out(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind)

    def own_packs(pairs: Sequence[Pair]) -> list[list[Pair]]:
        packs = pack_pairs(pairs, stage.sequence_length)
        most = int(gather_rows([float(len(packs))], context).max())
        return packs + [[] for _ in range(max(most, 1) - len(packs))]

    def evaluate() -> dict[str, float]:
        packs = own_packs(reader.read(evaluation[context.rank :: context.world_size]))
        sums = [0.0, 0.0, 0.0]
        for pack in packs:
            batch = pair_batch(pack, context.device, DTYPES[stage.precision])
            sums[0] += float(strategy.loss(batch))
            margins = batch.results.get("margins", torch.zeros(0))
            sums[1], sums[2] = sums[1] + float((margins > 0).sum()), sums[2] + len(margins)
        loss, right, count = gather_rows(sums, context).sum(axis=0)
        return {"preference/loss": float(loss / count), "preference/accuracy": float(right / count)} if count else {}

    if progress.evaluation_before is None:
        progress.evaluation_before = evaluate()
    metrics = MetricsLog(stage_dir / "metrics.jsonl", progress.step) if context.rank == 0 else None
    total = order.iterations
    notify("started", {"stage": stage.name, "step": progress.step, "total_steps": total, "attempt": attempt})
    notify("evaluation", {"when": "before", "loss": progress.evaluation_before})
    for step in range(progress.step + 1, total + 1):
        started = time.perf_counter()
        watchdog.mark(step, "reading the pairs of")
        drawn = order.draw(stage.batch.packs, Counter())
        pairs = reader.read(drawn[context.rank :: context.world_size])
        packs = own_packs(pairs)
        waited = time.perf_counter() - started
        factor = schedule_factor(stage.schedule, step - 1, total)
        seed_step(stage.seed, step - 1, context.rank)
        sums = [0.0, 0.0, 0.0, 0.0, 0.0]
        for number, pack in enumerate(packs):
            watchdog.mark(step, "running a pack of")
            batch = pair_batch(pack, context.device, DTYPES[stage.precision])
            sums[0] += float(strategy.accumulate(batch, 1.0 / max(len(drawn), 1), last=number == len(packs) - 1))
            sums[1] += float((batch.results.get("margins", torch.zeros(0)) > 0).sum())
            sums[2] += sum(pair.rows for pair in pack)
            sums[3] += sum(int(pair.prompt.image_tokens.sum()) for pair in pack)
        watchdog.mark(step, "updating the weights of")
        sums[4] = float(context.should_stop() is not None)
        loss, right, tokens, visual, stop = gather_rows(sums, context).sum(axis=0)
        loss, right = loss / max(len(drawn), 1), right / max(len(drawn), 1)
        norm = strategy.clip(stage.optimizer.clip)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            strategy.discard()
            error = NonFinite(f"step {step}: loss {loss}, gradient norm {norm}", step, [p.prompt.id for p in pairs])
            progress.record_nonfinite(error, stage.failure.on_nonfinite, stage_dir, context)
        else:
            strategy.step([group.peak_lr * factor for group in groups])
        seconds = time.perf_counter() - started
        sources = Counter(one.key[0] for one in drawn)
        counts = BatchCounts(
            2 * len(drawn), int(tokens), len(drawn), int(visual), len(packs), dict(sources), 1.0, 0.0, bool(stop)
        )
        progress.advance(step, counts, float(loss), seconds, skipped)
        line = {
            "step": step, "loss": float(loss) if math.isfinite(loss) else None, "accuracy": float(right),
            "supervised_tokens": counts.supervised_tokens, "tokens": counts.tokens, "samples": counts.samples,
            "learning_rate": part_learning_rates(stage, factor), "grad_norm": norm if math.isfinite(norm) else None,
            "step_seconds": seconds, "data_wait_seconds": waited, "tokens_per_second": counts.tokens / seconds,
            "pack_fill": counts.tokens / (counts.packs * context.world_size * stage.sequence_length),
            "samples_per_source": counts.samples_per_source, "max_over_mean_cost": 1.0,
            "visual_tokens": counts.visual_tokens,
        }  # fmt: skip
        if metrics:
            metrics.append(line)
        notify("step", line)
        watchdog.rest()  # writing may be slow
        due = stage.checkpoint.every_steps and step % stage.checkpoint.every_steps == 0
        if stop or due or step == total:
            if metrics:
                metrics.sync()
            path = writer.save(strategy, {
                **progress.state(), "total_steps": total, "data": order.state(), "recipe_hash": recipe_hash(recipe),
                "stage_hash": identity, "loss_scale": strategy.loss_scale.state() if strategy.loss_scale else None,
                "random": {"rule": "seeded per step", "seed": stage.seed},
                "saved_by": {"strategy": stage.parallel.strategy, "world_size": context.world_size},
            })  # fmt: skip
            context.report({"step": step, "loss": progress.loss}, path)
            notify("checkpoint", {"step": step, "path": str(path)})
        if stop and step < total:
            writer.wait()
            raise Preempted(f"stage {stage.name}: told to stop, saved at step {step}; run again to go on from there")
    writer.wait()
    barrier(context)
    after = evaluate()
    notify("evaluation", {"when": "after", "loss": after})
    export_final(strategy, stage, config, prepared.tokenizer_dir, stage_dir / "final", context)
    result = progress.result(after)
    if metrics:
        metrics.close()
    return result
