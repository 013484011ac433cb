"""A thousand curricula and everything that goes wrong with them, in virtual time: the operator's controller, unchanged, on the fake
API store with a simulated KubeRay and Kueue.

What goes wrong, at random but repeatably: programs fail, are killed, hang; KubeRay ends their RayJobs with reasons of its own, or not
at all; submitter pods are evicted and head pods replaced; nodes die and their pods never end; jobs of higher priority take the
quota; people suspend, pause and delete RayJobs; kinds are absent for minutes; watches deliver late, twice or never; API calls
fail before or after they took effect; the operator is killed and restarted; the wall clock jumps by up to an hour. After every start
of a program the invariants are checked.

    python tests/cluster/simulation.py --curricula 100 300 --write docs/reliability.md
"""

from __future__ import annotations

import argparse
import heapq
import logging
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "operators"), str(ROOT / "platform")]

from cluster_world import Clock, tiny_curriculum, tiny_stage  # noqa: E402
from fake.flaky import Flaky  # noqa: E402
from fake.kuberay import Cluster  # noqa: E402
from fake.store import Change, Store  # noqa: E402
from simulation_checks import LIMITS, STAGES, check_budgets, check_start, graph_of, slot  # noqa: E402
from simulation_table import table, write_section  # noqa: E402

from terrace.cluster.api import ApiError  # noqa: E402
from terrace_operator.controller import Controller  # noqa: E402

Manifest = dict[str, Any]
LINGER = "simulation/pods"
STEP_SECONDS, BOOT_SECONDS = 60.0, 40.0
CHANCES = {"exit 1": 0.10, "exit 137": 0.03, "hang": 0.03, "node dies": 0.02, "preempted": 0.03, "deleted by hand": 0.02,
           "submitter lost": 0.05, "head replaced": 0.03}  # fmt: skip
# How KubeRay closes the RayJob of a program that has ended, where it does not do it well.
CLOSES = {"SubmissionFailed": 0.05, "JobStatusCheckTimeoutExceeded": 0.02, "waits": 0.03, "never": 0.02}
PRIORITIES = {"experiment": 100, "pretraining": 1000}
GRAPHS = 0.3  # share of curricula with branches
WATCH_LOST, WATCH_TWICE = 0.02, 0.03


@dataclass
class Simulation:
    curricula: int
    seed: int = 0
    wall_limit: float = 86_400.0 * 30  # virtual seconds until what is not finished counts as stuck
    counts: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    reconcile_seconds: float = 0.0
    reconciles: int = 0

    def __post_init__(self) -> None:
        self.numbers = random.Random(self.seed)
        self.clock = Clock()
        self.store = Store(clock=self.clock.wall, history=200)
        self.cluster = Cluster(self.store, boot_seconds=BOOT_SECONDS, pods=False, messages=False, behaviour=self._behaviour)
        self.cluster.numbers = random.Random(self.seed + 1)
        self.cluster.ended = self._program_ended
        self.cluster.priorities, self.cluster.quota = PRIORITIES, max(2, self.curricula * 2 // 3)
        self.refused: Counter[str] = Counter()  # creations of a curriculum's RayJobs that were refused
        self.stopped: Counter[str] = Counter()  # wishes to suspend, under which no failure counts
        self.said: Counter[tuple[str, str]] = Counter()  # programs of a stage that said exit 1
        self.struck: Counter[tuple[str, str]] = Counter()  # what befell a stage's attempts from outside
        self.heap: list[tuple[float, int, str, Any]] = []
        self.number = 0
        self.wakes: dict[str, float] = {}
        self.finished: set[str] = set()
        self.succeeded: dict[str, list[str]] = {}
        self.attempts: dict[str, int] = {}
        self.graphs: set[str] = set()  # curricula whose stages form a graph
        self.running: dict[str, str] = {}  # curriculum, or stage of a graph -> RayJob whose program runs
        self.deleted_at: dict[str, float] = {}
        self.broken: list[str] = []
        self.controller: Controller | None = None
        self.store.listeners.append(self._changed)
        self.store.admission.append(self._linger)

    # ------------------------------------------------------------ the machinery

    def at(self, delay: float, kind: str, what: Any = None) -> None:
        self.number += 1
        heapq.heappush(self.heap, (self.clock.forward + delay, self.number, kind, what))

    def wake(self, name: str, delay: float, newest: bool = False) -> None:
        """As the operator's queue does: the earlier of two wishes, or (`newest`) what the last reconcile said."""
        due = self.clock.forward + delay
        if newest or self.wakes.get(name, float("inf")) > due:
            self.wakes[name] = due
            self.at(delay, "reconcile", (name, due))

    def _changed(self, kind: str, change: Change) -> None:
        """A write: whoever watches hears of it, late, twice or never."""
        if kind == "RayJob":
            name = change.body["metadata"]["name"]
            self.at(1.0, "job", name)
            if change.body["metadata"].get("deletionTimestamp"):
                self.deleted_at.setdefault(name, self.clock.forward)
        if kind in ("Curriculum", "RayJob", "ConfigMap"):
            dice = self.numbers.random()
            copies = 0 if dice < WATCH_LOST else 2 if dice > 1 - WATCH_TWICE else 1
            self.counts["watch events lost"] += copies == 0
            self.counts["watch events doubled"] += copies == 2
            for _ in range(copies):
                self.at(self.numbers.expovariate(2.0), "watch", (kind, change))

    def _linger(self, kind: str, body: Manifest, old: Manifest | None) -> Manifest | None:
        """A RayJob that is deleted stays until its pods are gone."""
        if kind != "RayJob" or old is not None:
            return None
        return {**body, "metadata": {**body["metadata"], "finalizers": [LINGER]}}

    def _behaviour(self, job: Manifest, stage: str, attempt: int) -> Manifest:
        """Called when a program starts: what will become of it, and whether it may start at all."""
        name = job["metadata"]["name"]
        check_start(self, name.rsplit("-s", 1)[0], name, stage, attempt)
        behaviour: Manifest = {"steps": 3, "step_seconds": STEP_SECONDS}
        dice = self.numbers.random()
        for what, chance in CHANCES.items():
            dice -= chance
            if dice < 0:
                self.counts[what] += 1
                if what != "preempted":
                    self.struck[name.rsplit("-s", 1)[0], stage] += what != "exit 1"
                if what.startswith("exit"):
                    behaviour["exit"] = int(what.split()[1])
                elif what == "hang":
                    behaviour["hang"] = True
                else:
                    self.at(self.numbers.uniform(1, 2.5 * STEP_SECONDS), what, name)
                break
        dice = self.numbers.random()
        for closes, chance in CLOSES.items():
            dice -= chance
            if dice < 0:
                self.counts[f"closed as {closes}"] += 1
                behaviour["closes"] = closes
                break
        return behaviour

    def _program_ended(self, job: Manifest, stage: str, status: int) -> None:
        """A program has said how it ended; what KubeRay makes of it is another matter."""
        curriculum = job["metadata"]["name"].rsplit("-s", 1)[0]
        if status == 0:
            done = self.succeeded.setdefault(curriculum, [])
            if stage not in done:
                done.append(stage)
        elif status == 1:
            self.said[curriculum, stage] += 1

    # ------------------------------------------------------------ the run

    def run(self) -> Simulation:
        self.restart()
        for number in range(self.curricula):
            self.at(self.numbers.uniform(0, 3600), "submit", number)
        self.at(600, "restart")
        self.at(3000, "clock")
        self.at(300, "resync")
        self.store.absent |= {"RayJob"}  # KubeRay is installed after the first curricula were made
        self.at(400, "present", "RayJob")
        self.at(2000, "absent")
        self.at(900, "borrow")
        while self.heap and len(self.finished) < self.curricula and self.clock.forward < self.wall_limit:
            due, _, kind, what = heapq.heappop(self.heap)
            self.clock.advance(max(due - self.clock.forward, 0.0))
            getattr(self, "_on_" + kind.replace(" ", "_"))(what)
        for number in range(self.curricula):
            if (name := f"c{number}") not in self.finished:
                self.broken.append(f"{name} is stuck: {self.status(name).get('phase')}")
        self.counts["preempted by priority"] = self.cluster.preemptions
        check_budgets(self)
        return self

    def status(self, name: str) -> Manifest:
        return (self.store.objects.get("Curriculum", {}).get(name) or {}).get("status") or {}

    def restart(self) -> None:
        """kill -9: what the operator had in memory is gone; a new one reads everything anew."""
        api = Flaky(self.store, self.numbers, self.calls, self.refused)
        self.controller = Controller(api, clock=self.clock.wall, monotonic=self.clock.monotonic)
        while True:
            try:
                names = self.controller.resync()
                break
            except ApiError:
                continue
        for name in names:
            self.wakes.pop(name, None)
            self.wake(name, self.numbers.uniform(0, 2))

    def _on_submit(self, number: int) -> None:
        stages = [tiny_stage(f"stage{index}") for index in range(STAGES)]
        queue = {"name": "training", "priorityClass": self.numbers.choice(list(PRIORITIES))}
        body = tiny_curriculum(f"c{number}", stages=stages, queue=queue, failurePolicy=LIMITS)
        body["status"] = {}
        if self.numbers.random() < GRAPHS:
            self.graphs.add(f"c{number}")
            body["spec"]["recipe"] |= {"stage_order": "graph", "stages": graph_of(stages)}
        self.store.create(body)
        if self.numbers.random() < 0.1:
            self.at(self.numbers.uniform(60, 3000), "suspend", f"c{number}")
        if self.numbers.random() < 0.1:
            self.at(self.numbers.uniform(60, 3000), "pause", f"c{number}")

    def _on_suspend(self, name: str) -> None:
        self._wish(name, "suspend")

    def _on_pause(self, name: str) -> None:
        self._wish(name, "paused")

    def _wish(self, name: str, wish: str) -> None:
        self.counts[wish] += 1
        self.stopped[name] += 1
        self.store.patch("Curriculum", name, {"spec": {wish: True}})
        self.at(self.numbers.uniform(100, 2000), "release", (name, wish))

    def _on_release(self, what: tuple[str, str]) -> None:
        self.store.patch("Curriculum", what[0], {"spec": {what[1]: False}})

    def _on_restart(self, _: Any) -> None:
        self.counts["operator restarts"] += 1
        self.restart()
        self.at(self.numbers.uniform(300, 1200), "restart")

    def _on_clock(self, _: Any) -> None:
        self.counts["clock jumps"] += 1
        self.clock.now += self.numbers.uniform(-3600, 3600)
        self.at(self.numbers.uniform(600, 3000), "clock")

    def _on_absent(self, _: Any) -> None:
        """A kind is not served for a while, as when the API server restarts and has not read its CRDs yet; objects remain."""
        kind = self.numbers.choice(["RayJob", "Workload"])
        self.counts["kinds absent"] += 1
        self.store.absent.add(kind)
        self.at(self.numbers.uniform(60, 400), "present", kind)
        self.at(self.numbers.uniform(1000, 4000), "absent")

    def _on_borrow(self, _: Any) -> None:
        """Another queue of the cohort leaves quota unused: more fits, until that queue asks for it back."""
        assert self.cluster.quota is not None
        lent = max(1, self.curricula // 10)
        self.cluster.quota += lent
        self.at(self.numbers.uniform(300, 1500), "reclaim", lent)

    def _on_reclaim(self, lent: int) -> None:
        """Kueue takes from the lowest priorities what the borrower holds beyond its own (`reclaimWithinCohort`)."""
        assert self.cluster.quota is not None
        self.cluster.quota -= lent
        if "RayJob" not in self.store.absent:
            self.counts["quota reclaimed by its owner"] += self.cluster.reclaim()
        self.at(self.numbers.uniform(300, 1500), "borrow")

    def _on_present(self, kind: str) -> None:
        self.store.absent.discard(kind)
        self.at(self.numbers.uniform(0, 20), "found", kind)

    def _on_found(self, _: Any) -> None:
        """The operator looks for absent kinds every 15 seconds and lists everything anew when one has come."""
        assert self.controller is not None
        try:
            if self.controller.look_for_absent():
                for name in self.controller.resync():
                    self.wake(name, 0.0)
        except ApiError:
            self.at(15.0, "found", None)

    def _on_resync(self, _: Any) -> None:
        assert self.controller is not None
        try:
            for name in self.controller.resync():
                self.wake(name, 0.0)
        except ApiError:
            self.counts["resyncs failed"] += 1
        self.at(300, "resync")

    def _on_watch(self, what: tuple[str, Change]) -> None:
        assert self.controller is not None
        kind, change = what
        if kind == "Curriculum" and change.kind != "DELETED" and self.controller.cache.knows(change.body):
            return
        if name := self.controller.cache.store(kind, change.body, deleted=change.kind == "DELETED"):
            self.wake(name, 0.0)

    def _on_reconcile(self, what: tuple[str, float]) -> None:
        assert self.controller is not None
        name, due = what
        if self.wakes.get(name) != due:
            return
        del self.wakes[name]
        started = time.process_time()
        try:
            again = self.controller.handle(name)
        except ApiError:
            self.counts["API errors met"] += 1
            again = 5.0
        self.reconcile_seconds += time.process_time() - started
        self.reconciles += 1
        if self.status(name).get("phase") in ("Succeeded", "Failed"):
            self.finished.add(name)
        if again is not None:
            self.wake(name, again, newest=True)

    def _on_job(self, name: str) -> None:
        job = self.store.objects.get("RayJob", {}).get(name)
        if job is None:
            self._ended(name)
            return
        if job["metadata"].get("deletionTimestamp"):  # its pods still live, until they are gone
            if name not in self.cluster.dead:
                self.at(self.numbers.uniform(2, 60), "pods gone", name)
            return
        self.cluster.tick_job(job, self.clock.forward)
        job = self.store.objects["RayJob"].get(name, job)
        status = job.get("status") or {}
        state = status.get("jobDeploymentStatus", "")
        if state in ("Complete", "Failed"):
            self._ended(name)
            return
        if state in ("Suspending", "Suspended"):
            self._ended(name)
            if self.cluster.quota is not None:  # the queue looks again when quota may be free
                self.at(self.numbers.uniform(20, 40), "job", name)
        if state in ("Initializing", "Running") and name not in self.cluster.dead:
            self.at(BOOT_SECONDS if state == "Initializing" else STEP_SECONDS / 2, "job", name)

    def _on_pods_gone(self, name: str) -> None:
        job = self.store.objects.get("RayJob", {}).get(name)
        if job is not None and job["metadata"].get("deletionTimestamp"):
            self.store.drop_finalizer(job, LINGER)

    def _on_node_dies(self, name: str) -> None:
        self.cluster.dead.add(name)

    def _on_preempted(self, name: str) -> None:
        if name in self.cluster.programs and name in self.store.objects["RayJob"]:
            self.cluster.preempt(name)

    def _on_submitter_lost(self, name: str) -> None:
        if name in self.cluster.programs and name in self.store.objects["RayJob"]:
            for _ in range(self.numbers.choice([1, 2, 9])):  # nine: more often than it is retried
                if name in self.cluster.programs:
                    self.cluster.evict_submitter(name)

    def _on_head_replaced(self, name: str) -> None:
        if name in self.cluster.programs and name in self.store.objects["RayJob"]:
            self.cluster.submitters[name] = self.numbers.choice([0, 9])
            self._ended(name)
            self.cluster.replace_head(name, self.clock.forward)

    def _on_deleted_by_hand(self, name: str) -> None:
        if name in self.cluster.programs and "RayJob" not in self.store.absent:
            self.store.delete("RayJob", name, foreground=True)

    # ------------------------------------------------------------ invariants

    def _ended(self, name: str) -> None:
        if self.running.get(slot(self, name)) == name:
            del self.running[slot(self, name)]

    @property
    def started(self) -> int:
        return sum(stage["attempt"] for number in range(self.curricula) for stage in self.status(f"c{number}").get("stages", ()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curricula", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="put the table into this file's section 'Operator simulation'")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    runs = []
    for number in options.curricula:
        started, cpu = time.perf_counter(), time.process_time()
        run = Simulation(number, options.seed).run()
        runs.append((run, time.perf_counter() - started, time.process_time() - cpu))
        for text in run.broken[:20]:
            print(text, file=sys.stderr)
    print(table(runs))
    if options.write:
        write_section(options.write, table(runs))
    return 1 if any(run.broken for run, *_ in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
