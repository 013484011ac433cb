"""One tiny stage under the ledger: start from a directory, save, resume and export, with so many ranks, as threads of this process."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from ledger import Ledger, counted, instruments
from packs import pack_segments, segment, tiny_model, tiny_recipe
from processes import run_ranks
from thread_ranks import run_threads

Limit = tuple[float, float]  # what a rank may have at most: so many models of float32 divided by the ranks, and so many whole ones

LIMITS: dict[tuple[str, str], Limit] = {  # by action and what is counted; three tensors of the model's size are checked and then read
    ("start", "read"): (1.05, 0), ("start", "received"): (0.01, 0), ("start", "written"): (0, 0), ("start", "held"): (2.1, 0),
    ("save", "read"): (0, 0), ("save", "received"): (0.01, 0), ("save", "written"): (3.1, 0), ("save", "held"): (3.05, 0),
    ("resume", "read"): (6.1, 0), ("resume", "received"): (0.01, 0), ("resume", "written"): (0, 0), ("resume", "held"): (3.05, 0),
    ("generate", "held"): (0, 1.05), ("train after", "held"): (0, 0),  # a rollout engine's own weights, while it generates and after
    ("generate in shards", "held"): (1.05, 0),  # between two layers, which are whole one at a time
    ("export", "read"): (0, 0), ("export", "received"): (1.3, 0), ("export", "written"): (1.3, 0), ("export", "held"): (1.3, 0),
}
_WEIGHTS_WHOLE = {  # ranks hold whole weights; DeepSpeed makes the rest of the state when it starts
    ("start", "received"): (0.0, 2.1), ("start", "held"): (4.1, 1.1), ("resume", "received"): (0.0, 1.1),
}
_REFERENCE_IN_SHARDS = {("reference", "read"): (1.05, 0), ("reference", "held"): (1.05, 0), ("reference", "received"): (0, 1.05)}
OWN_LIMITS: dict[str, dict[tuple[str, str], Limit]] = {
    "fsdp": {("accumulate", "held"): (0, 1.05), **_REFERENCE_IN_SHARDS},  # whole gradients, until the last pack of a step
    "fsdp-every-pack": {("accumulate", "held"): (1.05, 0), **_REFERENCE_IN_SHARDS},
    "ddp": {  # whole moments as well
        ("start", "received"): (0.0, 2.1), ("start", "held"): (0.0, 2.1),
        ("resume", "received"): (0.0, 3.1), ("resume", "held"): (0.0, 2.5),
        ("reference", "read"): (1.05, 0), ("reference", "held"): (0, 1.05),
    },
    "zero1": _WEIGHTS_WHOLE, "zero2": _WEIGHTS_WHOLE,
    "zero3": {  # block by block, of which each rank keeps its part
        ("start", "received"): (0.0, 3.1), ("start", "held"): (5.2, 0.0), **_REFERENCE_IN_SHARDS,
    },
}  # fmt: skip
ACTIONS = ("start", "reference", "accumulate", "generate", "generate in shards", "train after", "save", "resume", "export")


@dataclass
class Measured:
    """Ledgers by action and rank."""

    model_bytes: int
    largest: int  # bytes of the largest tensor
    tensors: int
    ledgers: dict[str, list[Ledger]]

    def most(self, action: str, what: str) -> int:
        return max(getattr(ledger, what) for ledger in self.ledgers[action])


def model_of(width: int) -> dict[str, Any]:
    values = tiny_model()
    values["config"]["text_config"] |= {"num_hidden_layers": 3, "hidden_size": width, "intermediate_size": 4 * width}
    values["config"]["vision_config"]["out_hidden_size"] = width
    values["config"]["text_config"]["rope_parameters"]["mrope_section"] = [width // 32, 3 * width // 64, 3 * width // 64]
    return values


def recipe_of(strategy: str, width: int) -> Any:
    """`strategy`, which may end in `-every-pack`."""
    name, _, every = strategy.partition("-")
    parallel = {"strategy": name, **({"reduce_every_pack": True} if every else {})}
    return tiny_recipe(model=model_of(width), parallel=parallel, batch={"packs": 64})


def start_directory(strategy: str, width: int, folder: Path) -> list[int]:
    """Write the weights that a stage starts from to `folder`/start; the bytes in float32 of each of their tensors."""
    from terrace.models.build import build_model, model_config
    from terrace.models.export import export_hf

    model = recipe_of(strategy, width).model
    config = model_config(model)
    state = {name: value.detach() for name, value in build_model(model, config).named_parameters()}
    export_hf(state, config, None, folder / "start")
    return [4 * value.numel() for value in state.values()]


def one_rank(rank: int, ranks: int, strategy: str, width: int, folder: str) -> dict[str, Ledger]:
    """What one rank does, with `instruments` there: start, one step, save, resume, export."""
    from terrace.generation.copies import EngineOnCopy, WholeWeights, light_copy
    from terrace.generation.native import NativeEngine
    from terrace.generation.sharded_weights import ShardedWeights
    from terrace.models.batch import to_device
    from terrace.models.build import meta_model, model_config
    from terrace.models.weights import initial_weights
    from terrace.objectives.lm import summed_loss
    from terrace.recipe.schema import Checkpoint
    from terrace.storage.run_storage import OnThisDisk
    from terrace.train.checkpoint import CheckpointWriter
    from terrace.train.finish import export_final
    from terrace.train.restore import CheckpointReader, newest_complete, resume
    from terrace.train.setup import prepare_strategy
    from terrace.worker.context import WorkerContext

    recipe, place, storage = recipe_of(strategy, width), Path(folder), OnThisDisk()
    config, context = model_config(recipe.model), WorkerContext(rank=rank, world_size=ranks, local_rank=rank)
    ledgers = {action: Ledger() for action in ACTIONS}
    with counted(ledgers["start"]):
        loss = partial(summed_loss, chunk_tokens=64)
        made = prepare_strategy(recipe.model, recipe.stages[0], config, context, loss, place / "start")
    random = np.random.default_rng(rank)
    batch = to_device(pack_segments(rank, [segment(random, 20, [(2, 2)])]), "cpu", torch.float32)
    with counted(ledgers["reference"]) as own:  # of a KL term
        skeleton = meta_model(config)
        reference = made.frozen(skeleton, initial_weights(recipe.model, skeleton, place / "start")[0], loss)
        reference(batch)
        dist.barrier()
        own.held = own.left()
    if not strategy.startswith("zero"):  # which reduces at every pack, or keeps whole gradients
        with counted(ledgers["accumulate"]) as own:
            made.accumulate(batch, 1e-2, last=False)
            dist.barrier()  # what a collective of threads exchanges is let go of when the next one ends
            own.held = own.left()
    made.accumulate(batch, 1e-2, last=True)
    made.clip(None)
    made.step([(1e-3, 0.0)] * len(made._groups if strategy.startswith("zero") else made._optimizers._groups))
    if not strategy.startswith("zero"):
        for action in ("generate", "generate in shards"):
            with counted(ledgers[action]) as own:
                model = light_copy(config, torch.float32)
                weights = WholeWeights(model, "cpu") if action == "generate" else ShardedWeights(model, context)
                engine = EngineOnCopy(weights, NativeEngine(model, (), (), "cpu", "fp32"), stays=False)
                engine.update_weights(lambda: made.tensors("weights"))
                dist.barrier()
                own.held = own.left()
                engine.sleep()
                ledgers["train after"].held = max(ledgers["train after"].held, own.left())
    writer = CheckpointWriter(place / "checkpoints", Checkpoint(), context, 1, storage)
    dist.barrier()
    with counted(ledgers["save"]):
        held = writer._copies(made, ())
    with counted(ledgers["save"]):
        writer._write(1, held, {"step": 1, "optimizer_steps": made.optimizer_steps()}, {})
    dist.barrier()
    with counted(ledgers["resume"]):
        found = newest_complete(place / "checkpoints", storage, context=context)
        resume(made, CheckpointReader(found.path, storage))
    with counted(ledgers["export"]):
        export_final(made, recipe, 0, config, None, place / "final", context, storage)
    return ledgers


@contextlib.contextmanager
def in_proportion() -> Iterator[None]:
    """The instruments, and what is read, sent and written at a time as small as the models."""
    from terrace.train import export, hand_over
    from terrace.train.strategies import deepspeed, shards

    with instruments(), contextlib.ExitStack() as stack:
        for module, name, small in (
            (export, "SMALLEST_FILE_BYTES", 50_000), (hand_over, "ROUND_BYTES", 50_000), (shards, "AHEAD_BYTES", 50_000),
            (deepspeed, "BUCKET", 12_500),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, small))
        yield


def one_process(rank: int, ranks: int, strategy: str, width: int, folder: str) -> dict[str, tuple[int, ...]]:
    """A rank with a process of its own, as DeepSpeed needs it: it keeps its state in globals."""
    with in_proportion():
        ledgers = one_rank(rank, ranks, strategy, width, folder)
    return {action: (own.read, own.written, own.received, own.held) for action, own in ledgers.items()}


def measured(strategy: str, ranks: int, folder: Path, width: int = 128) -> Measured:
    """Run the actions one after another; every rank counts its own."""
    sizes = start_directory(strategy, width, folder)
    if strategy.startswith("zero"):
        by_rank = run_ranks(ranks, one_process, strategy, width, str(folder), timeout=600)
        found = [{action: Ledger(*counts) for action, counts in own.items()} for own in by_rank]
    else:
        with in_proportion():
            found = run_threads(ranks, lambda rank, ranks: one_rank(rank, ranks, strategy, width, str(folder)))
    shutil.rmtree(folder)
    return Measured(sum(sizes), max(sizes), len(sizes), {action: [own[action] for own in found] for action in ACTIONS})
