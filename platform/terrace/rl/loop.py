"""One on-policy stage: draw, decode, score, choose, update, until its iterations are done. Read it top to bottom.

The counterpart of train.loop for `objective: grpo`, with the same signature style, files and observers' events;
strategy, checkpoints, optimizer, schedule and export are the training engine's. An iteration is `updates_per_rollout`
optimizer steps on one batch of rollouts. Within an iteration rollouts and rewards are kept on disk (`stored.py`);
checkpoints lie between iterations. A run that is killed anywhere repeats at most one decoding round and the update.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from terrace.data.order.permutation import seed_of
from terrace.data.tokenizer import load_tokenizer
from terrace.errors import InputError, Preempted
from terrace.generation.engines import forbidden_tokens, open_engine
from terrace.generation.interface import Sampling
from terrace.models.attention import choose_backend
from terrace.models.build import build_model, model_config
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.grpo import PolicyOptions, grpo_objective
from terrace.recipe.loading import recipe_hash, stage_hash
from terrace.recipe.schema import GrpoOptions, Recipe, Stage
from terrace.rewards.alarm import hacking_alarms
from terrace.rewards.router import Router
from terrace.rewards.sandbox import SandboxPool
from terrace.rl.collect import Collector
from terrace.rl.figures import examples, form_of, mean_reward, past_forms, task_figures
from terrace.rl.iteration import batch_counts, crossed, own_groups, pass_rate, update_line
from terrace.rl.prompts import PromptOrder, PromptReader, held_out
from terrace.rl.stored import forget_iterations, iteration_folder
from terrace.rl.update import PolicyStepper, UpdateOutcome
from terrace.train.checkpoint import CheckpointWriter, json_bytes, write_durably
from terrace.train.collectives import barrier, gather_rows
from terrace.train.context import WorkerContext
from terrace.train.finish import ask_suites, check_suites, export_final
from terrace.train.loop import Observer, StageResult, notifier
from terrace.train.metrics import MetricsLog
from terrace.train.optimizer import parameter_groups, part_learning_rates, schedule_factor
from terrace.train.progress import next_attempt, resume_or_hand_over
from terrace.train.setup import prepare_strategy
from terrace.train.step import NonFinite, seed_step
from terrace.train.watchdog import Watchdog, hang_folder, hang_timeout_seconds

log = logging.getLogger(__name__)

SANDBOX_WORKERS = 2


def train_rl_stage(
    recipe: Recipe,
    stage_index: int,
    prepared: Any,
    stage_dir: Path,
    start_weights: Path | None,
    context: WorkerContext,
    observers: Sequence[Observer] = (),
    attempt: int | None = None,
) -> StageResult:
    """Train a grpo stage to its end, or go on where it stopped. Done already: return its result.

    Raises Preempted after saving when told to stop, RewardFailures when too many rewards fail, NonFinite when a loss or
    gradient is not a number and the recipe says stop.
    """
    stage = recipe.stages[stage_index]
    options = stage.grpo or GrpoOptions()
    result_file = stage_dir / "result.json"
    if result_file.is_file():
        return StageResult(**json.loads(result_file.read_text()))
    check_suites(stage)
    if stage.failure.on_nonfinite == "rewind":
        raise InputError(f"stage {stage.name}: on_nonfinite rewind is not offered for grpo; use stop or skip")

    # Open: prompts, policy, reference, engine, rewards, checkpoint folder.
    tokenizer = load_tokenizer(prepared.tokenizer_dir)
    config = model_config(recipe.model, tokenizer)
    order = PromptOrder(recipe, stage_index, prepared)
    updates = options.updates_per_rollout
    total_steps = order.iterations * updates
    policy = policy_options(stage, options, forbidden_tokens(tokenizer, config))
    strategy = prepare_strategy(recipe, stage, config, context, grpo_objective(policy), start_weights)
    backend, _ = choose_backend(recipe.model.attention, torch.device(context.device).type, stage.precision)
    use_shared_prompt_attention(strategy.model, backend)
    reference = None
    if options.kl_coefficient > 0:
        reference = build_model(recipe.model, config, context.device, start=start_weights).eval().requires_grad_(False)
        use_shared_prompt_attention(reference, backend)
    groups = parameter_groups(strategy.model, stage)
    attempt = next_attempt(stage_dir / "checkpoints", context) if attempt is None else attempt
    writer = CheckpointWriter(stage_dir / "checkpoints", stage.checkpoint, context, attempt)
    barrier(context)
    identity = stage_hash(recipe, stage_index)
    place = SimpleNamespace(state=lambda _step: order.state(), restore=order.restore)
    progress = resume_or_hand_over(strategy, place, stage, identity, stage_dir, start_weights, context)

    opened = open_engine(recipe, stage, strategy, config, tokenizer, stage_dir, context)
    watching = Watchdog(hang_folder(stage_dir, attempt), hang_timeout_seconds(stage), context, stage.name)
    with SandboxPool(SANDBOX_WORKERS) as sandbox, closing(opened) as engine, watching as watchdog:
        collector = Collector(
            order=order,
            reader=PromptReader(recipe, stage_index, prepared, tokenizer),
            engine=engine,
            router=Router(stage.rewards, sandbox),
            tokenizer=tokenizer,
            options=options,
            seed=stage.seed,
            stage_hash=identity,
            context=context,
        )
        stepper = PolicyStepper(
            strategy, policy, stage.sequence_length, stage.precision, stage.optimizer.clip, context, reference
        )
        evaluation = held_out(recipe, stage_index, prepared, stage.evaluate.max_samples_per_kind)

        def evaluate() -> dict[str, float]:
            """Mean reward of held-out prompts per task: of answers sampled as in training, and of the greedy one."""
            if not evaluation:
                return {}
            engine.update_weights(lambda: strategy.tensors("weights"))
            engine.wake()
            longest = options.max_response_tokens
            seed = seed_of(stage.seed, "evaluation")  # the same random numbers every time
            sampled = Sampling(options.evaluation_samples, longest, options.temperature, options.top_p, seed)
            found = {}
            for name, how in (("reward", sampled), ("greedy_reward", Sampling(1, longest, temperature=0))):
                figures = task_figures(collector.score_once(evaluation, how))
                found |= {f"{name}/{task}": values["reward"] for task, values in figures.items()}
            engine.sleep()
            return found

        notify = notifier(observers, context)
        if progress.evaluation_before is None:
            progress.evaluation_before = evaluate()
        metrics = MetricsLog(stage_dir / "metrics.jsonl", progress.step) if context.rank == 0 else None
        history = past_forms(stage_dir / "metrics.jsonl") if context.rank == 0 else {}
        notify("started", {"stage": stage.name, "step": progress.step, "total_steps": total_steps, "attempt": attempt})
        notify("evaluation", {"when": "before", "loss": progress.evaluation_before})

        def save() -> None:
            if metrics:
                metrics.sync()
            state = {
                **progress.state(),
                "total_steps": total_steps,
                "data": order.state(),
                "recipe_hash": recipe_hash(recipe),
                "stage_hash": identity,
                "loss_scale": strategy.loss_scale.state() if strategy.loss_scale else None,
                "random": {"rule": "seeded per iteration and prompt", "seed": stage.seed},
                "saved_by": {"strategy": stage.parallel.strategy, "world_size": context.world_size},
            }
            path = writer.save(strategy, state)
            context.report({"step": progress.step, "loss": progress.loss}, path)
            notify("checkpoint", {"step": progress.step, "path": str(path)})

        # Iterate.
        evaluate_every = stage.evaluate.every_steps
        for iteration in range(progress.step // updates, order.iterations):
            started = time.perf_counter()
            doing = functools.partial(watchdog.mark, iteration * updates + 1)
            doing("giving the engine the weights of")
            engine.update_weights(lambda: strategy.tensors("weights"))
            engine.wake()
            synced = time.perf_counter()
            collected = collector.collect(iteration, iteration_folder(stage_dir, iteration), doing)
            engine.sleep()
            for group in collected.groups:
                order.pool.record(group.drawn.key, pass_rate(group))
            stop = bool(gather_rows([float(context.should_stop() is not None)], context).sum())
            figures = task_figures(collected.groups)
            shared = {
                "iteration": iteration + 1,
                "reward": mean_reward(figures),
                "tasks": figures,
                "groups_kept": len(collected.kept),
                "groups_drawn": len(collected.groups),
                "groups_without_difference": collected.selection.without_difference,
                "groups_unjudged": collected.selection.unjudged,
                "groups_surplus": collected.selection.surplus,
                "sampling_rounds": collected.rounds,
                "easy_pool": len(order.pool.members),
                "sync_seconds": synced - started,
                "rollout_seconds": collected.rollout_seconds,
                "reward_seconds": collected.reward_seconds,
            }

            # Update: one optimizer step per part of the batch; all parts' old log-probabilities come before the first.
            parts = [collected.kept[number::updates] for number in range(updates)]
            packs = [stepper.packs(own_groups(part, options, collected, collector, context)) for part in parts]
            old = [stepper.logprobs(part, doing) for part in packs] if updates > 1 else [None] * updates
            for number, (part, part_packs, part_old) in enumerate(zip(parts, packs, old)):
                step = iteration * updates + number + 1
                factor = schedule_factor(stage.schedule, step - 1, total_steps)
                seed_step(stage.seed, step - 1, context.rank)
                outcome: UpdateOutcome | None = None
                if part:
                    tokens = sum(group.response_tokens for group in part)
                    try:
                        rates = [group.peak_lr * factor for group in groups]
                        outcome = stepper.step(part_packs, tokens, rates, step, part_old, functools.partial(watchdog.mark, step))
                    except NonFinite as error:
                        progress.record_nonfinite(error, stage.failure.on_nonfinite, stage_dir, context)
                counts = batch_counts(part, stage, stop)
                seconds = time.perf_counter() - started
                started = time.perf_counter()
                skipped = outcome is None or outcome.skipped
                progress.advance(step, counts, outcome.loss if outcome else math.nan, seconds, skipped)
                line = {
                    "step": step,
                    **update_line(outcome, counts, stage, seconds),
                    "learning_rate": part_learning_rates(stage, factor),
                    **(shared if number == 0 else {}),
                }
                if number == 0 and outcome is not None:
                    for task, entropy in outcome.entropy.items():
                        figures[task]["entropy"] = entropy
                    if outcome.mismatch_mean > options.max_logprob_mismatch:
                        alarm(
                            f"iteration {iteration + 1}: log-probabilities of the rollout engine and the trainer differ by "
                            f"{outcome.mismatch_mean:.3f} on average, more than max_logprob_mismatch",
                            notify,
                        )
                last = number == updates - 1
                watchdog.rest()  # evaluation and writing may be slow
                if last and evaluate_every and crossed(step, updates, evaluate_every) and step < total_steps:
                    line["evaluation"] = evaluate()
                    notify("evaluation", {"when": step, "loss": line["evaluation"]})
                if metrics:
                    metrics.append(line)
                notify("step", line)

            if context.rank == 0:
                for task, values in figures.items():
                    history.setdefault(task, []).append(form_of(values))
                    messages = hacking_alarms(task, history[task])
                    if messages and not hacking_alarms(task, history[task][:-1]):  # once, not in every iteration after
                        alarm("; ".join(messages), notify)
                with open(stage_dir / "examples.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(
                        json.dumps(one, ensure_ascii=False) + "\n" for one in examples(collected.groups, iteration + 1)
                    )
            every, final = stage.checkpoint.every_steps, progress.step == total_steps
            if stop or final or (every and crossed(progress.step, updates, every)):
                save()
                if context.rank == 0:
                    forget_iterations(stage_dir, iteration)
            if stop and not final:
                writer.wait()
                raise Preempted(f"stage {stage.name}: told to stop, saved at step {progress.step}; run again to go on")

        # Finish as every stage does: the last checkpoint, evaluation, the Hugging Face directory, and the result last.
        writer.wait()
        barrier(context)
        after = evaluate()
        notify("evaluation", {"when": "after", "loss": after})
    export_final(strategy, stage, config, prepared.tokenizer_dir, stage_dir / "final", context)
    result = progress.result(after, ask_suites(stage, stage_dir, context))
    if metrics:
        metrics.close()
        write_durably(result_file, json_bytes(result))
        forget_iterations(stage_dir, order.iterations)
    barrier(context)
    notify("finished", result)
    return StageResult(**result)


def policy_options(stage: Stage, options: GrpoOptions, forbidden: tuple[int, ...]) -> PolicyOptions:
    """The loss's part of the recipe. With several updates per rollout the ratio is clipped only if the recipe says
    so."""
    return PolicyOptions(
        temperature=options.temperature,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        kl_coefficient=options.kl_coefficient,
        entropy_coefficient=options.entropy_coefficient,
        forbidden=forbidden,
        chunk_tokens=stage.loss_chunk_tokens,
        one_head_call=stage.parallel.strategy == "zero3",
    )


def alarm(message: str, notify: Observer) -> None:
    log.warning("%s", message)
    notify("alarm", {"message": message})
