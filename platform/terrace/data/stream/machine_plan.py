"""One planner per machine: local rank 0 packs the windows and deals the steps, and the machine's other ranks ask it for their hands.

Planning a step is the same work for any number of ranks, so eight ranks of a machine that each did it would do it eight times. What
goes from one to another is pack specifications, a few hundred bytes each; where the samples' bytes lie every rank looks up by itself,
in columns that all of them map. The other ranks keep a plan too, which packs nothing: it checks a checkpoint's order and knows who may
stand in for whom.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from terrace.data.order.plan import StagePlan
from terrace.data.types import PackSpec
from terrace.storage.socket_folder import socket_folder

log = logging.getLogger(__name__)

KEPT_STEPS = 4_096  # that some rank has not asked for yet; a rank further behind than that has its steps planned again


class Planner:
    """A plan that deals its steps to the ranks of this machine: each step once, whoever asks first."""

    def __init__(self, plan: StagePlan, ranks: int, local: Sequence[int]):
        """`ranks` take different packs; `local` is which of them each rank of this machine is (the same twice where two share packs)."""
        self.plan, self._ranks, self._local = plan, ranks, list(local)
        self._steps: OrderedDict[int, dict[int, list[PackSpec]]] = OrderedDict()  # step -> hands that are still waiting
        self._lock = threading.Lock()

    def hand(self, step: int, place: int = 0) -> list[PackSpec]:
        """The packs of a step for the machine's rank number `place`."""
        with self._lock:
            waiting = self._steps.get(step)
            if waiting is None or place not in waiting:
                dealt = self.plan.deal(step, self._ranks)
                waiting = self._steps[step] = {number: dealt[rank] for number, rank in enumerate(self._local)}
            hand = waiting.pop(place)
            if not waiting:
                del self._steps[step]
            while len(self._steps) > KEPT_STEPS:
                self._steps.popitem(last=False)
            return hand

    def state(self, step: int) -> dict[str, Any]:
        return self.plan.state(step)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.plan.restore(state)

    def total_steps(self) -> int:
        return self.plan.total_steps


@dataclass(frozen=True)
class Address:
    """Where a machine's planner answers its other ranks."""

    socket: str
    key: bytes


class PlannerServer:
    """Answers the other ranks of this machine from a `Planner`, one thread each. It ends when they do."""

    def __init__(self, planner: Planner, others: int):
        self._planner = planner
        folder = socket_folder("terrace-plan-")
        self.address = Address(str(folder / "socket"), secrets.token_bytes(32))
        self._listener = Listener(self.address.socket, "AF_UNIX", backlog=max(1, others), authkey=self.address.key)
        threading.Thread(target=self._accept, args=(others, folder), name="terrace-planner", daemon=True).start()

    def _accept(self, others: int, folder: Path) -> None:
        try:
            for _ in range(others):
                connection = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), name="terrace-planner-rank", daemon=True).start()
        except Exception:
            log.warning("the machine's planner stopped waiting for its ranks; those that are not there plan by themselves", exc_info=True)
        finally:
            self._listener.close()
            folder.rmdir()

    def _answer(self, connection: Connection) -> None:
        with connection:
            while True:
                try:
                    what, *arguments = connection.recv()
                except (EOFError, OSError):
                    return
                try:
                    answer = (True, getattr(self._planner, what)(*arguments))
                except Exception as error:
                    answer = (False, error)
                try:
                    connection.send(answer)
                except OSError:
                    return


class PlannerClient:
    """What `Planner` answers, asked of the machine's local rank 0. `plan` is this rank's own, which packs nothing."""

    def __init__(self, plan: StagePlan, address: Address, place: int):
        self.plan, self._place = plan, place
        self._connection = Client(address.socket, "AF_UNIX", authkey=address.key)
        self._lock = threading.Lock()  # a stream plans ahead in a thread while the loop asks for its state

    def hand(self, step: int) -> list[PackSpec]:
        return self._ask("hand", step, self._place)

    def state(self, step: int) -> dict[str, Any]:
        return self._ask("state", step)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.plan.restore(state)
        self._ask("restore", dict(state))  # whoever is first: else the planner would walk there

    def total_steps(self) -> int:
        total = self._ask("total_steps")
        self.plan.count_as(total)
        return total

    def _ask(self, what: str, *arguments: Any) -> Any:
        with self._lock:
            try:
                self._connection.send((what, *arguments))
                well, answer = self._connection.recv()
            except (EOFError, OSError) as error:
                raise RuntimeError(f"the planner of this machine is gone (its local rank 0 ended): process {os.getpid()}") from error
        if not well:
            raise answer
        return answer
