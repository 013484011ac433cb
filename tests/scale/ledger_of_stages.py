"""One tiny stage under the ledger: start from a directory, save, resume and export, with so many ranks, as threads of this process."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ledger import Ledger, counted, instruments
from packs import tiny_model, tiny_recipe
from thread_ranks import run_threads

# Per action, what a rank may have, in models of float32 divided by the ranks: what is read are three tensors of the model's size, which are
# compared with their checksums and then read.
SHARES: dict[str, dict[str, float]] = {
    "start": {"read": 1.05, "received": 0.01, "written": 0.0, "held": 1.05},
    "save": {"read": 0.0, "received": 0.01, "written": 3.1, "held": 3.05},
    "resume": {"read": 6.1, "received": 0.01, "written": 0.0, "held": 2.1},
    "export": {"read": 0.0, "received": 1.3, "written": 1.3, "held": 1.3},
}
# Under DDP every rank has whole weights and moments, so it receives and makes them, in models: their number does not grow with the ranks.
WHOLE = {("start", "received"): 2.1, ("start", "held"): 2.1, ("resume", "received"): 3.1, ("resume", "held"): 2.5}


@dataclass
class Measured:
    """Ledgers by action and rank."""

    model_bytes: int
    ledgers: dict[str, list[Ledger]]

    def most(self, action: str, what: str) -> int:
        return max(getattr(ledger, what) for ledger in self.ledgers[action])


def model_of(layers: int) -> dict[str, Any]:
    values = tiny_model()
    values["config"]["text_config"] |= {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 512}
    values["config"]["vision_config"]["out_hidden_size"] = 128
    values["config"]["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    return values


def measured(strategy: str, ranks: int, folder: Path, layers: int = 3) -> Measured:
    """Run the actions one after another; every rank counts its own."""
    from terrace.models.build import build_model, model_config
    from terrace.models.export import export_hf
    from terrace.objectives.lm import summed_loss
    from terrace.recipe.schema import Checkpoint
    from terrace.storage.run_storage import OnThisDisk
    from terrace.train import export, hand_over
    from terrace.train.checkpoint import CheckpointWriter
    from terrace.train.finish import export_final
    from terrace.train.restore import CheckpointReader, newest_complete, resume
    from terrace.train.setup import prepare_strategy
    from terrace.train.strategies import shards
    from terrace.worker.context import WorkerContext

    recipe = tiny_recipe(model=model_of(layers), parallel={"strategy": strategy})
    config, stage = model_config(recipe.model), recipe.stages[0]
    state = {name: value.detach() for name, value in build_model(recipe.model, config).named_parameters()}
    start = export_hf(state, config, None, folder / "start")
    ledgers = {action: [Ledger() for _ in range(ranks)] for action in SHARES}
    size = 4 * sum(value.numel() for value in state.values())

    def work(rank: int, world: int) -> None:
        context = WorkerContext(rank=rank, world_size=world, local_rank=rank)
        with counted(ledgers["start"][rank]):
            loss = partial(summed_loss, chunk_tokens=64)
            made = prepare_strategy(recipe.model, stage, config, context, loss, start)
        for parameter in made._parameters.values():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        made.step([1e-3] * len(made._optimizers._groups))
        writer = CheckpointWriter(folder / "checkpoints", Checkpoint(), context, 1, OnThisDisk())
        dist.barrier()
        with counted(ledgers["save"][rank]):
            held = writer._copies(made, ())
        with counted(ledgers["save"][rank]):
            writer._write(1, held, {"step": 1, "optimizer_steps": made.optimizer_steps()}, {})
        dist.barrier()
        with counted(ledgers["resume"][rank]):
            found = newest_complete(folder / "checkpoints", OnThisDisk(), context=context)
            resume(made, CheckpointReader(found.path, OnThisDisk()))
        with counted(ledgers["export"][rank]):
            export_final(made, recipe, 0, config, None, folder / "final", context, OnThisDisk())

    with instruments(), contextlib.ExitStack() as stack:  # what is read, sent and written at a time, in the model's proportion
        for module, name in ((export, "SMALLEST_FILE_BYTES"), (hand_over, "ROUND_BYTES"), (shards, "AHEAD_BYTES")):
            stack.enter_context(mock.patch.object(module, name, 50_000))
        run_threads(ranks, work)
    shutil.rmtree(folder)
    return Measured(size, ledgers)
