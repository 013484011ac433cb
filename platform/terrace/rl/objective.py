"""The objective `grpo`: draw, decode, score, choose; then `updates_per_rollout` optimizer steps on what was chosen.

The loop (train.loop) opens, resumes, steps, saves and ends the stage as it does for every objective. An iteration happens
in `steps`, when its first step is asked for: the engine gets the weights, rollouts and rewards are collected and kept on
disk (`stored.py`), and each optimizer step takes its part of the groups. Checkpoints lie between iterations, so a run
that is killed anywhere repeats at most one decoding round and the update.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch

from terrace.data.order.permutation import seed_of
from terrace.errors import TerraceError
from terrace.generation.engines import open_engine
from terrace.generation.interface import Sampling
from terrace.generation.tokens import forbidden_tokens
from terrace.models.attention import choose_backend
from terrace.models.build import meta_model
from terrace.models.lora import merged
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.models.weights import initial_weights
from terrace.objectives.experts import ExpertBalance, open_balance
from terrace.objectives.grpo import PolicyBatch, summed_policy_loss
from terrace.objectives.interface import Counts, Objective, Opening, StageRun, StepExamples
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.rewards.alarm import hacking_alarms
from terrace.rewards.places import settled
from terrace.rewards.router import Router
from terrace.rewards.sandbox import SandboxPool
from terrace.rl import ledger
from terrace.rl.collect import Collected, Group
from terrace.rl.environments import Environments
from terrace.rl.figures import examples, form_of, past_forms, task_figures
from terrace.rl.iteration import IDLE, iteration_figures, own_groups, part_counts, pass_rate
from terrace.rl.judgements import Judgements
from terrace.rl.overlap import OverlappedCollector
from terrace.rl.policy import collector_of, policy_options
from terrace.rl.stored import forget_iterations, iteration_folder
from terrace.rl.trace import Trace
from terrace.rl.units import TrainGroup, pack_groups, policy_batch, sampled_logprobs
from terrace.rl.update import UpdateFigures
from terrace.worker.collectives import gather_objects

log = logging.getLogger(__name__)

SANDBOX_WORKERS = 2
ITERATIONS_WITHOUT_AN_UPDATE = 8  # in a row, after which the stage stops


@dataclass(frozen=True)
class PolicyPack:
    """Groups that run as one pack. `old`: log-probabilities before the first of several updates, on the host."""

    groups: Sequence[TrainGroup]
    old: torch.Tensor | None = None


@dataclass
class Update:
    """One optimizer step of an iteration: `number` of `of`, from 0."""

    iteration: int
    number: int
    of: int
    part: list[Group]
    collected: Collected
    figures: dict[str, dict[str, float]]  # per task, of the whole iteration
    shared: dict[str, Any]  # the iteration's own fields of metrics.jsonl
    examples: list[dict[str, Any]]  # of the iteration, in words

    @property
    def last(self) -> bool:
        return self.number == self.of - 1


class Grpo(Objective):
    """`feed` is a rl.prompt_feed.PromptFeed: the order of prompts and how they are read."""

    ends_with_its_samples = False
    random_rule = "seeded per iteration and prompt"

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        self._options = opening.stage.grpo or GrpoOptions()
        self._updates = self._options.updates_per_rollout
        self.skipped_in_a_row = ITERATIONS_WITHOUT_AN_UPDATE * self._updates
        forbidden = forbidden_tokens(opening.feed.tokenizer, opening.feed.config)
        self._policy = policy_options(opening.stage, self._options, forbidden)
        self._figures = UpdateFigures()
        self._held = ExitStack()
        self._reference: Callable[[PolicyBatch], Any] | None = None  # gives a batch its log-probabilities
        self._collector: Any = None
        self._experts: ExpertBalance | None = None
        self._history: dict[str, list[Any]] = {}
        self._update: Update | None = None
        self._mismatch = 0.0
        self._version = 0  # iterations that were trained, as far as the weights go
        self._ran = False
        self._trace = Trace()
        self._trained_from = self._engine_seen = time.time()
        self._judgements = Judgements(opening.stage.seed, opening.recipe.data.max_image_pixels)

    # ------------------------------------------------------------ a stage

    def begin(self, run: StageRun) -> None:
        super().begin(run)
        opening, stage, feed = self.opening, self.opening.stage, self.opening.feed
        recipe, context = opening.recipe, opening.context
        backend, _ = choose_backend(recipe.model.attention, torch.device(context.device).type, stage.precision)
        use_shared_prompt_attention(run.strategy.model, backend)
        self._experts = open_balance(opening, run.strategy.model)
        if self._options.kl_coefficient > 0:
            reference = meta_model(feed.config)
            source, _ = initial_weights(recipe.model, reference, opening.start_weights, stage.model_changes)
            use_shared_prompt_attention(reference, backend)
            self._reference = run.strategy.frozen(reference, source, self._policy_loss)
        sandbox = self._held.enter_context(SandboxPool(SANDBOX_WORKERS))
        router = Router(settled(stage.rewards, recipe, opening.stage_dir.parent), sandbox, bool(stage.environment))
        environments = Environments(stage.environment, tuple(stage.rewards), sandbox, feed.reader.sights)
        self._held.callback(environments.close)
        alive = functools.partial(run.mark, 1, "judging the stage's prompts before")
        rows = feed.readiness.unready_rows(opening.stage_dir, sandbox.judge, environments, context, alive)
        run.rest()
        feed.reader.unready = {(row.source, row.row): row.reason for row in rows}
        self.unready_prompts = len(rows)
        engine = open_engine(recipe.model, stage, run.strategy.model, feed.config, feed.tokenizer, context)
        self._engine = self._held.enter_context(closing(engine))
        self._collector = collector_of(self._options)(
            order=feed.order,
            reader=feed.reader,
            engine=self._engine,
            router=router,
            tokenizer=feed.tokenizer,
            options=self._options,
            seed=stage.seed,
            stage_hash=feed.stage_hash,
            context=context,
            environments=environments,
        )

    def evaluate(self, alive: Callable[[], None]) -> dict[str, float]:
        """Mean reward of held-out prompts per task: of answers sampled as in training, and of the greedy one."""
        held_out = self.opening.feed.held_out
        if not held_out:
            return {}
        self._wake_engine()
        longest = self._options.max_response_tokens
        seed = seed_of(self.opening.stage.seed, "evaluation")  # the same random numbers every time
        sampled = Sampling(self._options.evaluation_samples, longest, self._options.temperature, self._options.top_p, seed)
        found = {}
        for name, how in (("reward", sampled), ("greedy_reward", Sampling(1, longest, temperature=0))):
            figures = task_figures(self._collector.score_once(held_out, how))
            found |= {f"{name}/{task}": values["reward"] for task, values in figures.items()}
        self._engine.sleep()
        return found

    def _wake_engine(self) -> None:
        self._engine.update_weights(lambda: merged(self.strategy.model, self.strategy.tensors("weights")), self._version)
        self._engine.wake()

    def steps(self, start: int) -> Iterator[StepExamples]:
        if self.opening.context.rank == 0:
            self._history = past_forms(self.opening.stage_dir / "metrics.jsonl")
            ledger.forget_after(self.opening.stage_dir, start)
        try:
            for iteration in range(start // self._updates, self.opening.feed.order.iterations):
                yield from self._iteration(iteration)
        finally:
            self._collector.close()

    def _iteration(self, iteration: int) -> Iterator[StepExamples]:
        """One batch of rollouts, in as many parts as it has optimizer steps. All parts' old log-probabilities come before
        the first step."""
        assert self.run is not None
        opening, order = self.opening, self.opening.feed.order
        doing = functools.partial(self.run.mark, iteration * self._updates + 1)
        started = time.perf_counter()
        self._version, self._trace = iteration, Trace()
        self._collector.trace = self._trace
        doing("giving the engine the weights of")
        self._wake_engine()
        synced = time.perf_counter()
        self._trace.note("weights", self._trace.begin)
        if not isinstance(self._collector, OverlappedCollector):
            self._engine_seen = time.time()  # else it decodes all the time
        collected = self._collector.collect(iteration, iteration_folder(opening.stage_dir, iteration), doing)
        idle = self._trace.engine(self._engine.usage.taken() if self._engine.usage else None, self._engine_seen)
        self._engine_seen = self._trained_from = time.time()
        self._engine.sleep()
        if not collected.groups and not collected.damaged and not collected.unready and not collected.stale:
            return  # the order has ended
        self._judgements.add(collected.groups, collected.prompts, iteration + 1, opening.context)
        for group in collected.groups:
            order.pool.record(group.drawn.key, pass_rate(group))
        figures = task_figures(collected.groups)
        shared = iteration_figures(iteration, collected, figures, len(order.pool.members), synced - started, idle)
        shown = [one for hand in gather_objects(examples(collected.groups, iteration + 1), opening.context) for one in hand]
        parts = [collected.kept[number :: self._updates] for number in range(self._updates)]
        packs = [
            self._packs(own_groups(part, self._options, collected, self._collector, opening.context)) for part in parts
        ]
        if self._updates > 1:
            packs = [[PolicyPack(pack.groups, self._logprobs(pack, doing)) for pack in own] for own in packs]
        for number, (part, own) in enumerate(zip(parts, packs)):
            self._update = Update(iteration, number, self._updates, part, collected, figures, shared if number == 0 else {}, shown)
            yield StepExamples(
                iteration * self._updates + number, list(own), boundary=self._update.last,
                damaged_samples=len(collected.damaged) if number == 0 and opening.context.rank == 0 else 0,
            )  # fmt: skip

    def _packs(self, groups: Sequence[TrainGroup]) -> list[PolicyPack]:
        """This rank's packs, filled up with empty ones to the most that any rank has."""
        packs = [PolicyPack(groups) for groups in pack_groups(groups, self.opening.stage.sequence_length)]
        most = int(self.opening.gather([float(len(packs))]).max())
        return packs + [self.empty()] * (max(most, 1) - len(packs))

    def _logprobs(self, pack: PolicyPack, doing: Callable[[str], None]) -> torch.Tensor:
        """Log-probabilities of a pack's tokens under the current weights (before the first of several updates)."""
        batch = self._plain_batch(pack)
        doing("computing log-probabilities of")
        self.strategy.loss(batch)
        return batch.results.get("logprobs", torch.zeros(0)).cpu()

    # ------------------------------------------------------------ a step

    def weight(self, example: PolicyPack) -> float:
        """What weighs alike by `average`; responses without a reward are not among it."""
        if self._options.average == "tokens":
            return self._response_tokens(example)
        responses = sum(len(group.responses) for group in example.groups)
        return responses * (self._options.max_response_tokens if self._options.average == "constant" else 1)

    @staticmethod
    def _response_tokens(example: PolicyPack) -> int:
        return sum(group.response_tokens for group in example.groups)

    def count(self, taken: StepExamples) -> Counts:
        assert self._update is not None
        counts = Counts()
        if self.opening.context.rank == 0:  # every rank knows all groups
            counts = part_counts(self._update.part, self.opening.stage)
        counts.supervised_tokens = sum(self._response_tokens(pack) for pack in taken.examples)
        counts.rows = sum(group.rows for pack in taken.examples for group in pack.groups)
        counts.damaged_samples = taken.damaged_samples
        return counts

    def empty(self) -> PolicyPack:
        return PolicyPack(())

    def before(self, examples: Sequence[PolicyPack], scale: float) -> None:
        self._figures = UpdateFigures(self._version)
        if self._experts:
            self._experts.before(
                examples, scale, lambda example: self.strategy.loss(self._plain_batch(example)), lambda example: len(example.groups)
            )

    def batch(self, example: PolicyPack) -> PolicyBatch:
        batch = self._plain_batch(example)
        if example.old is not None:
            batch.old_logprobs = example.old.to(batch.tokens.device)
        if self._reference is not None:
            batch.reference_logprobs = self._reference_logprobs(example)
        if self._policy.correction is not None:
            batch.sampled_logprobs = sampled_logprobs(example.groups).to(batch.tokens.device)
        return batch

    def _plain_batch(self, example: PolicyPack) -> PolicyBatch:
        return policy_batch(example.groups, self.opening.context.device, self.opening.dtype)

    def _reference_logprobs(self, example: PolicyPack) -> torch.Tensor:
        batch = self._plain_batch(example)
        self._reference(batch)
        return batch.results.get("logprobs", torch.zeros(0, device=self.opening.context.device))

    def loss(self, model: Any, batch: PolicyBatch) -> torch.Tensor:
        if self._experts is None:
            return self._policy_loss(model, batch)
        return self._experts.loss(model, batch.batch, lambda: self._policy_loss(model, batch))

    def _policy_loss(self, model: Any, batch: PolicyBatch) -> torch.Tensor:
        return summed_policy_loss(model, batch, self._policy)

    def seen(self, example: PolicyPack, batch: PolicyBatch) -> None:
        self._figures.add(example.groups, batch.results)

    def names(self, example: PolicyPack) -> list[str]:
        return [group.prompt.id for group in example.groups]

    # ------------------------------------------------------------ figures

    def values(self, ran: bool) -> dict[str, Any]:
        update = self._update
        assert update is not None
        self._ran = ran
        balance = self._experts.values(ran) if self._experts else {}
        if not ran:
            self._mismatch = 0.0
            return {"pack_fill": 0.0, **update.shared}
        found = self._figures.outcome(self.opening.context)
        if update.number == 0:
            for task, entropy in found.entropy.items():
                update.figures[task]["entropy"] = entropy
        self._mismatch = found.fields.get("logprob_mismatch_mean", 0.0)
        return {**found.fields, **update.shared, **balance}

    def why_nothing_trains(self, taken: StepExamples) -> str:
        assert self._update is not None
        collected = self._update.collected
        chosen = collected.selection
        left_out = self._options.truncated == "leave_out" and collected.kept
        if left_out and not any(response.finished for group in collected.kept for response in group.responses):
            return "every response ran into max_response_tokens, and `truncated: leave_out` trains none of those"
        return (
            f"no group of the iteration teaches: of {len(collected.groups)}, {chosen.without_difference} without a "
            f"difference between rewards, {chosen.unjudged} with fewer than two rewards; {len(collected.damaged)} prompts "
            f"could not be read, {len(collected.unready)} are left out as unready"
        )

    def after_step(self, step: int) -> None:
        update, context = self._update, self.opening.context
        assert update is not None
        if update.number == 0 and self._mismatch > self._options.max_logprob_mismatch:
            self._alarm(
                f"iteration {update.iteration + 1}: log-probabilities of the rollout engine and the trainer differ by "
                f"{self._mismatch:.3f} on average, more than max_logprob_mismatch"
            )
        if update.last:
            self._version = update.iteration + 1
        if not update.last or context.rank != 0:
            return
        self._trace.note("training", self._trained_from)
        self._trace.write(self.opening.stage_dir, update.iteration + 1, {"idle": update.shared.get(IDLE)})
        if line := ledger.fates(update.collected):
            about = {"step": step, "iteration": update.iteration + 1, **({} if self._ran else {"skipped": True})}
            ledger.append(self.opening.stage_dir, about | line)
        for task, values in update.figures.items():
            self._history.setdefault(task, []).append(form_of(values))
            messages = hacking_alarms(task, self._history[task])
            if messages and not hacking_alarms(task, self._history[task][:-1]):  # once, not in every iteration after
                self._alarm("; ".join(messages))
        with open(self.opening.stage_dir / "examples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(one, ensure_ascii=False) + "\n" for one in update.examples
            )

    def _alarm(self, message: str) -> None:
        assert self.run is not None
        log.warning("%s", message)
        self.run.notify("alarm", {"message": message})

    # ------------------------------------------------------------ files

    def saved(self, step: int) -> None:
        if self.opening.context.rank == 0 and self._update is not None:
            forget_iterations(self.opening.stage_dir, self._update.iteration)
            self._judgements.write(self.opening.stage_dir)

    def state(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "judgements", self._judgements.tensor()
        if isinstance(self._collector, OverlappedCollector):
            yield "rollouts", torch.frombuffer(bytearray(self._collector.state()), dtype=torch.uint8)

    def load(self, source: Callable[[str], torch.Tensor]) -> None:
        try:
            self._judgements.load(source("judgements"))
        except TerraceError:  # a checkpoint of before there was a sample
            log.info("the checkpoint has no sample of judgements; a new one begins")
        if isinstance(self._collector, OverlappedCollector):
            self._collector.restore(source("rollouts").numpy().tobytes())

    def finished(self) -> None:
        if self.opening.context.rank == 0:
            forget_iterations(self.opening.stage_dir, self.opening.feed.order.iterations)
            self._judgements.write(self.opening.stage_dir)

    def close(self) -> None:
        super().close()
        if self._collector is not None:
            self._collector.close()
        self._held.close()
        self._reference = None


open_objective = Grpo
