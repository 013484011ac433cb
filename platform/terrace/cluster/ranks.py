"""The processes that torchrun or Slurm's srun started, without Ray: rank 0 controls the run, all others do what it orders.

Orders go through torch's TCP store: at torchrun's own, or one that rank 0 opens at MASTER_ADDR:MASTER_PORT. They are few (an attempt
begins, an attempt is ended, all go home), numbered from 1, and read by every rank in that order. They are JSON: whoever reaches the store's
port can say what is trained, but not what is executed.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from terrace.errors import InputError, TerraceError

NAMES = {"rank": ("RANK", "SLURM_PROCID"), "world": ("WORLD_SIZE", "SLURM_NTASKS"), "local": ("LOCAL_RANK", "SLURM_LOCALID")}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_SECONDS = 0.2
JOIN_SECONDS = 300.0  # how long the others may take to start


@dataclass(frozen=True)
class Ranks:
    """This process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    prefix: str  # of keys, so that a restart by torchrun finds none of those before it
    hosted: bool  # the store is torchrun's
    file: str = ""  # of the store, instead of address and port: all ranks are on this machine


def by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment


def ranks_of(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Raises InputError where neither torchrun nor srun has said what this process is."""
    found = {}
    for what, names in NAMES.items():
        value = next((environment[name] for name in names if environment.get(name, "").isdigit()), None)
        if value is None:
            raise InputError(
                f"--launcher ranks is for processes that torchrun or srun starts: neither {names[0]} nor {names[1]} is set. "
                "`torchrun --nproc-per-node 8 -m terrace.cli run RECIPE --run-dir DIR` starts eight on this machine"
            )
        found[what] = int(value)
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise InputError(
            'the ranks meet at MASTER_ADDR and MASTER_PORT, which are not set; in a Slurm script: export MASTER_ADDR=$(scontrol show'
            ' hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))'
        )
    prefix = f"terrace/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Ranks(found["rank"], found["world"], found["local"], address, int(port), prefix, hosted)


def is_follower(launcher: str | None) -> bool:
    """Whether this process only does what rank 0 orders: it reads no recipe and prints nothing."""
    return launcher == "ranks" and ranks_of().rank > 0


@functools.cache
def store_of(ranks: Ranks) -> Any:
    """This process's connection. Raises TerraceError where rank 0 is not there within minutes."""
    import torch.distributed as dist

    if ranks.file:
        return dist.PrefixStore(ranks.prefix, dist.FileStore(ranks.file))
    master = ranks.rank == 0 and not ranks.hosted
    try:
        store = dist.TCPStore(
            ranks.address, ranks.port, is_master=master, timeout=datetime.timedelta(seconds=JOIN_SECONDS), wait_for_workers=False
        )
    except (RuntimeError, OSError) as error:
        raise TerraceError(f"rank {ranks.rank}: no store at {ranks.address}:{ranks.port} ({str(error).splitlines()[0]})") from error
    return dist.PrefixStore(ranks.prefix, store)


def order(ranks: Ranks, number: int, what: dict[str, Any]) -> None:
    store_of(ranks).set(f"order/{number}", json.dumps(what))


def ordered(ranks: Ranks, number: int) -> dict[str, Any] | None:
    """The order of that number, if it was given."""
    store = store_of(ranks)
    return json.loads(store.get(f"order/{number}")) if store.check([f"order/{number}"]) else None


def deaf_to_signals() -> None:
    """torchrun, srun and a terminal signal every process of a job; only rank 0 acts on it, and asks the others for a checkpoint."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # not ignored: what these processes start would inherit that
