"""reconcile(curriculum, world, now) -> plan: what to write into the status and what to do next. Pure: no clock, no network.

The decisions are the state machine's (`terrace.curriculum.machine`), the same that a local run and Ray Jobs use; here its state is
read from the status, the spec's wishes become its requests, and its actions become API calls. The caller writes the status first,
with the resourceVersion it read, and carries the effects out only if that write went through. So a reconcile that started from
an old view does nothing at all, and a crash between write and effect is repaired by the next reconcile: what is decided here is
decided again from the status.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from terrace.cluster import manifests
from terrace.cluster.cluster_schema import CurriculumSpec
from terrace.curriculum.actions import Action, Clear, Finish, Launch, Prepare, Record, Stop, Wait
from terrace.curriculum.graph import with_dependents
from terrace.curriculum.machine import next_actions
from terrace.curriculum.state import TERMINAL, RunState, apply
from terrace_operator import absent, observe, recipes, status, usage
from terrace_operator.codec import Memory, decode, encode
from terrace_operator.observe import World
from terrace_operator.status import Event

Manifest = dict[str, Any]
MAX_ROUNDS = 24  # a round ends in an effect or a wait; a curriculum of 32 stages with gates needs a few
QUEUE_CHECK_SECONDS = 60.0  # safety tick: everything also wakes by events
RUNNING_CHECK_SECONDS = 60.0
DELETION_CHECK_SECONDS = 10.0


@dataclass(frozen=True)
class Create:
    """Create the object; if it exists, adopt it (it is ours by its name)."""

    body: Manifest


@dataclass(frozen=True)
class Delete:
    """Delete the RayJob with everything it owns, waiting for its pods (foreground); only this very object (uid)."""

    name: str
    uid: str


@dataclass(frozen=True)
class Direct:
    """Tell the running attempt to save a checkpoint and stop, through a key of the progress ConfigMap."""

    name: str
    key: str
    directive: Manifest


Effect = Create | Delete | Direct


@dataclass(frozen=True)
class Plan:
    status: Manifest
    effects: list[Effect] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    requeue_seconds: float = QUEUE_CHECK_SECONDS


def reconcile(curriculum: Manifest, world: World, now: float) -> Plan:
    """One decision for one Curriculum as the API server holds it. `now` is seconds since the epoch."""
    old_status = curriculum.get("status") or {}
    accepted = recipes.accept(curriculum, old_status, world)
    if accepted.spec is None:
        return Plan(status.refused(curriculum, old_status, accepted.reason, accepted.problem, now))
    spec = accepted.spec
    state, memory = decode(old_status.get("controller") or {}, [stage.name for stage in spec.recipe.stages])
    memory.edits_ignored = list(accepted.edits_ignored)
    _clamp_times(state, now)
    events = [Event(reason, message) for reason, message in _follow(curriculum, state, memory, world, now)]
    effects: list[Effect] = []
    waiting: Wait | None = None
    usage.follow(spec, memory, world, now)
    used = usage.used(state, memory, now)
    full, near = usage.reached(spec.limits, used), usage.near(spec.limits, used)
    if near and not memory.near_limit and not full:
        events.append(Event("LimitNear", near, True))
    memory.near_limit = near is not None
    if full and not spec.suspend:
        spec = spec.model_copy(update={"suspend": True})  # what a person would have asked for
        if state.phase == "running" and state.request is None:
            events.append(Event("LimitReached", full, True))
    _requests(spec, state, memory, now, events)
    effects, waiting = _decide(curriculum, spec, state, memory, world, now, events)
    progress = manifests.progress_config_map(curriculum)
    if state.attempts_in_flight and not effects and f"ConfigMap/{progress['metadata']['name']}" not in world.objects:
        effects.append(Create(progress))  # somebody deleted the channel: without it, a running attempt would look stalled
    new_status = status.derive(curriculum, old_status, accepted, state, memory, world, waiting, now)
    status.show_limits(new_status, usage.shown(spec.limits, state, memory, now), full, state)
    events += status.news(old_status, new_status)
    new_status["controller"] = encode(state, memory)
    requeue = _requeue(curriculum["metadata"]["name"], spec, state, world, waiting, now)
    left = usage.seconds_left(spec.limits, used) if state.phase == "running" else None
    return Plan(new_status, effects, events, min(requeue, max(left + 0.5, 0.5)) if left is not None else requeue)


def _follow(curriculum: Manifest, state: RunState, memory: Memory, world: World, now: float) -> list[tuple[str, str]]:
    return observe.follow_queue(curriculum["metadata"]["name"], state, memory, world, now)


def _clamp_times(state: RunState, now: float) -> None:
    """Times in the future come from a clock that was set back: nothing may wait for them."""
    for stage in state.stages:
        if stage.attempt_started_at is not None:
            stage.attempt_started_at = min(stage.attempt_started_at, now)


def _requests(spec: CurriculumSpec, state: RunState, memory: Memory, now: float, events: list[Event]) -> None:
    """What the spec wishes, as the state machine's requests. Level-triggered: the wish is compared with the state each time."""

    def request(kind: str, told: bool = True, **values: Any) -> None:
        apply(state, {"event": f"{kind}_requested", "time": now, **values})
        if told:
            events.append(Event(f"{kind.capitalize()}Requested", f"{kind} was asked for in the spec"))

    if state.phase == "new":
        memory.resume_token = spec.resume_token  # a token that was there from the start asks for nothing
        return
    if spec.cancelled and state.phase not in TERMINAL and state.request != "cancel":
        request("cancel")
    if spec.resume_token != memory.resume_token and not state.attempts_in_flight and state.request is None:
        memory.resume_token = spec.resume_token
        if spec.resume_token is not None and spec.rerun_from:
            request("rerun", stage=spec.rerun_from, stages=with_dependents(spec.recipe, spec.rerun_from))
        elif spec.resume_token is not None:
            request("resume")
    if state.phase in TERMINAL or state.request == "cancel":
        return
    if state.phase == "suspended" and not spec.suspend:
        request("resume")
    if state.phase == "paused" and state.reason == "PauseRequested" and (spec.suspend or not spec.paused):
        request("resume", told=not spec.suspend)  # a pause that is to become a suspension goes on for a moment
    if state.phase == "running" and state.request == "pause" and not spec.paused:
        request("resume")
    if state.phase == "running" and spec.suspend and state.request not in ("suspend", "cancel"):
        request("suspend")
    if state.phase == "running" and spec.paused and state.request is None:
        request("pause")


def _decide(
    curriculum: Manifest,
    spec: CurriculumSpec,
    state: RunState,
    memory: Memory,
    world: World,
    now: float,
    events: list[Event],
) -> tuple[list[Effect], Wait | None]:
    """Run the state machine until it waits, finishes, or wants something done in the cluster."""
    effects: list[Effect] = []
    name = curriculum["metadata"]["name"]
    lacking = absent.lacking(spec, world.absent)
    held = Wait(now + QUEUE_CHECK_SECONDS, absent.message(lacking)) if lacking else None
    for _ in range(MAX_ROUNDS):
        if held and state.attempts_in_flight:
            return effects, held  # what cannot be seen has not failed
        observation = observe.observe(name, spec, state, memory, world, now)
        records_only = True
        for action in next_actions(spec.recipe, state, observation, now, width=len(state.stages)):
            if held and (isinstance(action, Launch) or starts_attempt(action)):
                return effects, held
            match action:
                case Record():
                    apply(state, {**action.event, "time": now})
                    _remember(spec, state, memory, action.event)
                    if action.event["event"] == "run_started":
                        _requests(spec, state, memory, now, events)  # it may be made suspended or paused
                    if event := status.event_of(action.event):
                        events.append(Event(*event))
                case Prepare():
                    # The stage's own program ingests and indexes, and skips what is done.
                    apply(state, {"event": "data_prepared", "time": now})
                case Clear():
                    pass  # the program moves the files: it is told the number of the rerun
                case Launch() | Stop():
                    effects += _effects(curriculum, spec, state, memory, world, action)
                    records_only = False
                case Wait():
                    return effects, action
                case Finish():
                    return effects, None
        if not records_only:
            return effects, None
    return effects, Wait(now + 1.0, "more to record")


def starts_attempt(action: Action) -> bool:
    return isinstance(action, Record) and action.event["event"] == "stage_attempt_started"


def _remember(spec: CurriculumSpec, state: RunState, memory: Memory, event: Manifest) -> None:
    """At an attempt's start: which recipe it reads, so that a later edit of the spec cannot reach into it."""
    if event["event"] != "stage_attempt_started":
        if event["event"] == "stage_cleared":
            memory.stage_hashes.pop(event["stage"], None)  # a rerun takes the stage as it is written now
        return
    stage = state.stage(event["stage"])
    assert stage is not None
    memory.stage_hashes[stage.name] = recipes.hash_of(spec.recipe, stage.index)
    memory.recipe_maps[stage.name] = recipes.digest_of(spec.recipe)


def _effects(curriculum: Manifest, spec: CurriculumSpec, state: RunState, memory: Memory, world: World, action: Action) -> list[Effect]:
    name = curriculum["metadata"]["name"]
    if isinstance(action, Launch):
        rerun = state.stages[action.stage_index].reruns
        return _creations(curriculum, spec, memory, world, action.stage_index, action.attempt, rerun)
    assert isinstance(action, Stop)
    job_name = manifests.rayjob_name(name, action.stage_index, action.attempt)
    job = world.rayjobs.get(job_name)
    if job is None:
        return []
    report = observe.report_of(world, action.stage, action.attempt)
    listens = observe.speaks(report, job) and not observe.is_queued(job)
    if action.force or not listens:
        if job["metadata"].get("deletionTimestamp"):
            return []
        return [Delete(job_name, job["metadata"]["uid"])]
    directive = {"stage": action.stage, "attempt": action.attempt, "stop": action.reason}
    prefix = manifests.progress_prefix(spec.recipe, action.stage_index)
    if world.directives.get(prefix) == directive:
        return []
    return [Direct(manifests.progress_name(name), f"{prefix}directive.json", directive)]


def _creations(
    curriculum: Manifest, spec: CurriculumSpec, memory: Memory, world: World, index: int, attempt: int, rerun: int
) -> list[Effect]:
    """The RayJob last: what its pods need is there before it."""
    digest = memory.recipe_maps[spec.recipe.stages[index].name]
    recipe_map = manifests.recipe_name(curriculum["metadata"]["name"], digest)
    bodies = [manifests.progress_config_map(curriculum), manifests.disruption_budget(curriculum)]
    if spec.runtime.service_account is None:
        bodies += manifests.trainer_access(curriculum)
    missing = [body for body in bodies if f"{body['kind']}/{body['metadata']['name']}" not in world.objects]
    if f"ConfigMap/{recipe_map}" not in world.objects:  # writing it out takes milliseconds
        missing.append(manifests.recipe_config_map(curriculum, digest, recipes.text_of(spec.recipe)))
    job = manifests.build_rayjob(curriculum, spec, index, attempt, recipe_map, rerun)
    return [Create(body) for body in [*missing, job]]


def _requeue(name: str, spec: CurriculumSpec, state: RunState, world: World, waiting: Wait | None, now: float) -> float:
    """Seconds until the next look, at the latest; everything that is watched wakes it earlier."""
    if state.phase in TERMINAL or state.phase in ("paused", "suspended"):
        return QUEUE_CHECK_SECONDS * 10
    if not state.attempts_in_flight and any(job["metadata"].get("deletionTimestamp") for job in world.rayjobs.values()):
        return DELETION_CHECK_SECONDS  # its end is an event; this is for the fence and for a lost event
    if not state.attempts_in_flight:
        return min(max(waiting.until - now, 0.5), QUEUE_CHECK_SECONDS) if waiting is not None else 2.0
    if any(stage.stop_deadline for stage in state.stages):
        return 2.0
    limits = [(observe.silence_limit(name, spec, stage, world), world.quiet(stage)) for stage in state.attempts_in_flight]
    left = min((limit - quiet for limit, quiet in limits if limit is not None), default=RUNNING_CHECK_SECONDS)
    return min(max(left + 0.5, 0.5), RUNNING_CHECK_SECONDS)
