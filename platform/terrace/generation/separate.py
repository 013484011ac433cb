"""Rollouts on workers of their own (`placement: separate`), the only file of the RL loop that imports ray.

Rollout workers are Ray actors; each holds an engine and a whole copy of the policy (2 bytes per parameter in bf16, 4 in fp32). Rank 0
of the training workers starts them and pushes the weights before every rollout through Ray's object store, some tensors at a time, so
generation stays strictly on-policy; training workers wait meanwhile, as rollout workers do during the update. What it buys is room: the
training engine and the rollout engine (its key-value cache above all) share no GPU, and their numbers are chosen apart.
Random numbers depend on (seed, iteration, prompt, sample) alone, so the responses are those of `placement: colocated`.
"""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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

HAND_OVER_BYTES = 256 * 2**20


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

    def precisions(self) -> dict[str, str] | None:
        """In which type the engine takes each tensor; None: it wants all of them at once, in float32."""
        found = getattr(self._engine, "precisions", None)
        return None if found is None else {name: str(dtype).removeprefix("torch.") for name, dtype in found.items()}

    def load(self, weights: dict[str, np.ndarray], version: int) -> None:
        """Take over some tensors of the policy (or all), as `as_bytes` made them."""
        # The object store's memory is read-only, which torch warns of; the engine copies from it.
        self._engine.update_weights(lambda: ((name, from_bytes(np.array(one))) for name, one in weights.items()), version)

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
        self._precisions: dict[str, str] | None = None
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
            [self._precisions] = self._call([self._started[0].precisions.remote()])
        from_rank_zero(None, context)  # the workers exist before another rank looks for them
        share = range(context.rank, count, context.world_size) or [context.rank % count]
        self._workers = [ray.get_actor(names[number]) for number in share]

    usage = None  # not known

    def update_weights(self, tensors: Callable[[], Iterator[tuple[str, Any]]], version: int = 0) -> None:
        """Push the policy to every rollout worker, `HAND_OVER_BYTES` at a time and in the precision that the engine keeps, so nobody
        holds a second whole copy. Gathering the tensors is collective: every rank takes part."""
        own = self._context.rank == 0
        part: dict[str, np.ndarray] = {}
        held = 0
        waiting: list[Any] = []
        for name, tensor in tensors():
            if not own:
                continue
            wanted = "float32" if self._precisions is None else self._precisions[name]
            part[name] = as_bytes(tensor.detach(), wanted)
            held += part[name].nbytes
            if self._precisions is not None and held >= HAND_OVER_BYTES:
                self._call(waiting)  # at most one part is under way while the next is gathered
                waiting, part, held = self._push(part, version), {}, 0
        if own:
            self._call(waiting)
            self._call(self._push(part, version))
        from_rank_zero(None, self._context)

    def _push(self, part: dict[str, np.ndarray], version: int) -> list[Any]:
        import ray

        reference = ray.put(part)  # once per machine, in memory that its rollout workers share
        return [worker.load.remote(reference, version) for worker in self._started]

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

    def together(self) -> AbstractContextManager[None]:
        """Each rank decodes on its own."""
        return nullcontext()

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


def as_bytes(tensor: Any, precision: str) -> np.ndarray:
    """The tensor on the host in a precision; numpy has no bfloat16, so that is its bits as int16."""
    import torch

    held = tensor.to("cpu", getattr(torch, precision), copy=True).contiguous()
    return held.view(torch.int16).numpy() if precision == "bfloat16" else held.numpy()


def from_bytes(array: np.ndarray) -> Any:
    """The tensor that `as_bytes` made an array of."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
