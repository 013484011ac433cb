"""The strategy that a stage names. Each is imported only when it is wanted: DeepSpeed need not be installed for the others."""

from __future__ import annotations

from terrace.errors import InputError
from terrace.train.strategies.interface import Setup, Strategy


def open_strategy(setup: Setup) -> Strategy:
    """The strategy that the stage names. Raises InputError for one whose library is not installed."""
    name = setup.stage.parallel.strategy
    if name == "ddp":
        from terrace.train.strategies.ddp import DataParallel

        return DataParallel(setup)
    if name == "fsdp":
        from terrace.train.strategies.fsdp import FullyShard

        return FullyShard(setup)
    if name in ("zero1", "zero2", "zero3"):
        from terrace.train.strategies.deepspeed import Zero

        return Zero(setup)
    raise InputError(f"parallel.strategy {name} is unknown")
