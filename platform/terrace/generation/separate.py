"""Rollouts on workers of their own (`placement: separate`), the only file of the RL loop that imports ray.

Rollout workers are Ray actors; each holds an engine and a whole copy of the policy (4 bytes per parameter). Rank 0 of the
training workers starts them and pushes the weights before every rollout through Ray's object store, so generation stays
strictly on-policy; training workers wait meanwhile, as rollout workers do during the update. What it buys is room: the
training engine and the rollout engine (its key-value cache above all) share no GPU, and their numbers are chosen apart.
Random numbers depend on (seed, iteration, prompt, sample) alone, so the responses are those of `placement: colocated`.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrace.errors import InputError, TerraceError
from terrace.generation.interface import GroupReady, Prompt, Response, Sampling
from terrace.recipe.schema import Model as ModelSection
from terrace.recipe.schema import Stage
from terrace.recipe.schema_grpo import GrpoOptions
from terrace.worker.collectives import from_rank_zero
from terrace.worker.context import WorkerContext


class RolloutWorkerLost(TerraceError):
    """A rollout worker ended. What other rounds have decoded is kept; the stage goes on from there when it is resumed."""


class RolloutWorker:
    """What runs in a rollout worker: an engine on a copy of the policy."""

    def __init__(self, section: ModelSection, stage: Stage, tokenizer_dir: str, number: int) -> None:
        from terrace.data.tokenizer import load_tokenizer
        from terrace.generation.copies import open_copy_engine
        from terrace.models.build import model_config

        tokenizer = load_tokenizer(tokenizer_dir)
        device = "cuda:0" if stage.resources.gpus_per_worker else "cpu"  # Ray shows the actor its own GPU only
        context = WorkerContext(rank=number, device=device)
        config = model_config(section, tokenizer)
        self._engine = open_copy_engine(section, stage, config, tokenizer, context, alone=True)

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Take over the policy: whole float32 tensors by parameter name."""
        import torch

        # The object store's memory is read-only, which torch warns of; the engine copies from it.
        self._engine.update_weights(lambda: ((name, torch.from_numpy(np.array(w))) for name, w in weights.items()))

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> Iterator[tuple[int, list[Response]]]:
        """(place of a prompt, its responses), each as soon as it is complete."""
        complete: queue.Queue[Any] = queue.Queue()

        def work() -> None:
            try:
                self._engine.wake()
                self._engine.generate(prompts, sampling, lambda place, group: complete.put((place, group)))
                self._engine.sleep()
                complete.put(None)
            except BaseException as error:
                complete.put(error)

        threading.Thread(target=work, name="rollout", daemon=True).start()
        while (item := complete.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class SeparateEngine:
    """See rollout.RolloutEngine. Each training worker gives its prompts to rollout workers of its own share."""

    def __init__(self, section: ModelSection, stage: Stage, tokenizer_dir: Path, context: WorkerContext) -> None:
        import ray

        if not ray.is_initialized():
            raise InputError(
                f"stage {stage.name}: placement separate starts rollout workers with Ray; run it by `terrace run`, or choose colocated"
            )
        self._context, self._stage = context, stage
        count = (stage.grpo or GrpoOptions()).rollout_workers
        names = [f"terrace-rollout-{uuid.uuid4().hex[:12]}-{number}" for number in range(count)]
        names = from_rank_zero(names, context)
        self._started: list[Any] = []
        if context.rank == 0:
            resources = stage.resources
            actor = ray.remote(
                num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, scheduling_strategy="SPREAD"
            )(RolloutWorker)
            self._started = [
                actor.options(name=name).remote(section, stage, str(tokenizer_dir), number)
                for number, name in enumerate(names)
            ]
            self._call([worker.__ray_ready__.remote() for worker in self._started])  # type: ignore[attr-defined]
        from_rank_zero(None, context)  # the workers exist before another rank looks for them
        share = range(context.rank, count, context.world_size) or [context.rank % count]
        self._workers = [ray.get_actor(names[number]) for number in share]

    usage = None  # not known

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        """Push the policy to every rollout worker. Gathering the tensors is collective: every rank takes part."""
        import ray

        own = self._context.rank == 0
        weights = {}
        for name, tensor in tensors():
            if own:
                weights[name] = tensor.detach().float().cpu().numpy()
        if own:
            reference = ray.put(weights)  # once per machine, shared by its rollout workers
            self._call([worker.load.remote(reference) for worker in self._started])
        from_rank_zero(None, self._context)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, ready: GroupReady | None = None
    ) -> list[list[Response]]:
        """Prompts dealt to this rank's rollout workers; `ready` is called in the caller's thread."""
        groups: dict[int, list[Response]] = {}
        arrived: queue.Queue[Any] = queue.Queue()
        for number, worker in enumerate(self._workers):
            places = list(range(number, len(prompts), len(self._workers)))
            if places:
                stream = worker.generate.options(num_returns="streaming").remote([prompts[p] for p in places], sampling)
                threading.Thread(target=self._follow, args=(stream, places, arrived), daemon=True).start()
        while len(groups) < len(prompts):
            item = arrived.get()
            if isinstance(item, BaseException):
                raise item
            place, group = item
            groups[place] = group
            if ready is not None:
                ready(place, group)
        return [groups[place] for place in range(len(prompts))]

    def _follow(self, stream: Any, places: Sequence[int], arrived: queue.Queue[Any]) -> None:
        try:
            for reference in stream:
                (place, group) = self._call([reference])[0]
                arrived.put((places[place], group))
        except BaseException as error:
            arrived.put(error)

    def _call(self, references: Sequence[Any]) -> list[Any]:
        """The values behind references. A rollout worker that is gone, and what it raised, become errors of this stage."""
        import ray

        try:
            return ray.get(list(references))
        except ray.exceptions.RayActorError as error:
            raise RolloutWorkerLost(
                f"stage {self._stage.name}: a rollout worker ended ({str(error).strip().splitlines()[0]}); resume the run to go on"
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TerraceError):
                raise error.cause from error
            raise

    def sleep(self) -> None:
        """Rollout workers share no memory with training."""

    def wake(self) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """End the rollout workers."""
        import ray

        for worker in self._started:
            ray.kill(worker)
        self._started = []
