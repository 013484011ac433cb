"""A world for the state machine: attempts that progress, fail, are preempted, vanish; a controller that is killed anywhere.

Seeded and in memory. It checks, at every action, what must never happen: two live attempts of a stage, or of two in a sequence; a
stage before what it waits for, or run again after its success; a launch after the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from terrace.cluster.attempt import AttemptObservation
from terrace.curriculum.actions import Clear, Finish, Launch, Observation, Prepare, Record, Stop, Wait
from terrace.curriculum.graph import waits_for, with_dependents
from terrace.curriculum.machine import next_actions
from terrace.curriculum.state import fold
from terrace.recipe.schema import Recipe


@dataclass
class Process:
    """One attempt's real life, which the controller only sees through observations."""

    stage: str
    attempt: int
    status: str = "running"
    live: bool = True
    failure: str | None = None
    progress_at: float = 0.0
    asked_to_stop: bool = False
    slow_to_die: int = 0


@dataclass
class World:
    recipe: Recipe
    seed: int
    chaos: float = 0.3  # chance per tick that something happens to the run
    width: int = 1  # attempts at a time, where the recipe is a graph
    loses_with_controller: bool = True  # the local launcher's attempts die with the controller, a cluster's do not
    now: float = 1_000_000.0
    events: list[dict[str, Any]] = field(default_factory=list)
    processes: dict[tuple[str, int], Process] = field(default_factory=dict)
    finished: Finish | None = None
    launches: int = 0
    widest: int = 0
    controller_kills: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.names = [stage.name for stage in self.recipe.stages]

    def tick(self, calm: bool = False) -> None:
        """One turn of the controller, killed between any two actions by chance; then the world moves."""
        state = fold(self.names, self.events)
        actions = next_actions(self.recipe, state, self.observe(), self.now, self.width)
        assert actions, "the machine always says what to do next"
        survives = len(actions) if calm or self.random.random() > 0.1 * self.chaos else self.random.randrange(len(actions))
        for action in actions[:survives]:
            self.perform(action)
        if survives < len(actions):
            self.kill_controller()
        self.move(calm)

    def perform(self, action: Any) -> None:
        match action:
            case Record(event):
                self.record(event)
            case Prepare():
                self.record({"event": "data_prepared"})
            case Launch(index, stage, attempt):
                self.launch(index, stage, attempt)
            case Stop(_, stage, attempt, _, force):
                process = self.processes.get((stage, attempt))
                if process and process.live:
                    process.asked_to_stop = True
                    if force:
                        process.status = process.status if process.status == "succeeded" else "failed"
                        process.failure = process.failure or "infrastructure"
                        process.live = process.slow_to_die > 0
            case Wait() | Clear():
                pass
            case Finish():
                self.finished = action

    def record(self, event: dict[str, Any]) -> None:
        if event["event"] == "stage_attempt_started":
            state = fold(self.names, self.events)
            index = self.names.index(event["stage"])
            done = {stage.name for stage in state.stages if stage.phase == "completed"}
            assert waits_for(self.recipe, index) <= done, "a stage waits for those before it"
            assert len(state.attempts_in_flight) < self.width, "no more at a time than there is room for"
            self.widest = max(self.widest, len(state.attempts_in_flight) + 1)
            assert state.stages[index].phase != "completed", "a stage is not run again after it succeeded"
            assert event["attempt"] == state.stages[index].attempt + 1
            assert state.phase == "running", f"no attempt starts in a run that is {state.phase}"
        self.events.append({"time": self.now, **event})

    def launch(self, index: int, stage: str, attempt: int) -> None:
        in_flight = {(other.name, other.attempt) for other in fold(self.names, self.events).attempts_in_flight}
        others = [key for key, process in self.processes.items() if process.live and key not in in_flight]
        assert not others, f"{stage} {attempt} was launched while {others} live"
        existing = self.processes.get((stage, attempt))
        if existing and existing.status != "absent":
            return  # adopted
        self.launches += 1
        self.processes[stage, attempt] = Process(stage, attempt, progress_at=self.now, slow_to_die=self.random.choice([0, 0, 2]))

    def observe(self) -> Observation:
        seen = [
            AttemptObservation(
                process.stage,
                process.attempt,
                process.status,
                live=process.live,
                failure=process.failure,
                reason=process.status,
                message="told by the world",
                progress_at=process.progress_at,
                result={"steps": 3, "loss": 1.0, "evaluation": {"after": {"caption": 1.0}}} if process.status == "succeeded" else None,
            )
            for process in self.processes.values()
            if process.status != "absent"
        ]
        live = [key for key, process in self.processes.items() if process.live]
        return Observation(tuple(seen), tuple(live))

    def kill_controller(self) -> None:
        self.controller_kills += 1
        self.finished = None
        if self.loses_with_controller:
            for process in self.processes.values():
                if process.live:
                    process.status, process.live = "interrupted", False

    def move(self, calm: bool) -> None:
        """What happens outside: time, progress, endings, accidents, requests."""
        self.now += self.random.choice([0.2, 1.0, 5.0])
        if not calm and self.random.random() < 0.02 * self.chaos:
            self.now += self.random.choice([-3600.0, 3600.0, -86400.0])
        for process in self.processes.values():
            self.move_process(process, calm)
        if not calm and self.random.random() < 0.1 * self.chaos:
            self.request()

    def move_process(self, process: Process, calm: bool) -> None:
        if not process.live:
            return
        if process.status != "running":  # ended, its processes still go
            process.slow_to_die -= 1
            process.live = process.slow_to_die > 0
            return
        chance = self.random.random()
        if process.asked_to_stop and chance < 0.5:
            self.end(process, "preempted", None)
        elif not calm and chance < self.chaos * 0.4:
            ending = self.random.choice(["program", "infrastructure", "preempted", "vanish", "hang"])
            if ending == "hang":
                return
            if ending == "vanish":
                process.status, process.live = "absent", False
            else:
                self.end(process, "preempted" if ending == "preempted" else "failed", None if ending == "preempted" else ending)
        elif chance > 0.7:
            self.end(process, "succeeded", None)
        elif chance > 0.4:
            process.progress_at = self.now

    def end(self, process: Process, status: str, failure: str | None) -> None:
        process.status, process.failure = status, failure
        process.live = process.slow_to_die > 0

    def request(self) -> None:
        """A person asks for something; resuming sometimes, so that most runs come to an end."""
        state = fold(self.names, self.events)
        if state.phase == "new":
            return
        kind = self.random.choice(["pause", "suspend", "resume", "resume", "rerun", "cancel"])
        if kind == "cancel" and self.random.random() < 0.8:
            return
        event: dict[str, Any] = {"event": f"{kind}_requested"}
        if kind == "rerun":
            if state.attempts_in_flight or any(process.live for process in self.processes.values()):
                return
            event["stage"] = self.random.choice(self.names)
            event["stages"] = with_dependents(self.recipe, event["stage"])
        self.finished = None
        self.record(event)

    def settle(self, limit: int = 2000) -> Finish:
        """From here nothing bad happens: the run must come to rest."""
        for _ in range(limit):
            if self.finished:
                return self.finished
            self.tick(calm=True)
        raise AssertionError(f"the run is stuck: {fold(self.names, self.events)}")
