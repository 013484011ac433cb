"""The controller: carries out what the state machine says, with a launcher, until the run is done or has to stop.

    outcome = run_curriculum(recipe, run_dir, launcher, Display())

The loop is: take requests into the journal, look at the attempts, ask the state machine, act, show. Every decision is
in the journal before it is carried out, so a controller that is killed anywhere is followed by one that goes on from
the same place.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from terrace.cluster.attempt import Launcher, LaunchRequest
from terrace.curriculum import machine
from terrace.curriculum.actions import Action, Clear, Finish, Launch, Observation, Prepare, Record, Stop, Wait
from terrace.curriculum.graph import with_dependents
from terrace.curriculum.journal import Journal, pending_requests, read_journal
from terrace.curriculum.lease import outlast_lease
from terrace.curriculum.refused import refused_sentences
from terrace.curriculum.run_directory import changed_keys, check_changes, refuse_foreign_recipe, store_recipe, stored_recipe
from terrace.curriculum.state import RunState, StageState, apply, fold
from terrace.curriculum.watch import Watch
from terrace.errors import InputError
from terrace.recipe.identity import recipe_hash, taken_from
from terrace.recipe.schema import Recipe
from terrace.storage import mirror
from terrace.storage.files import join
from terrace.storage.run_layout import stage_directory
from terrace.track.progress import Display

POLL_SECONDS = 0.2
ENDINGS = {
    "stage_completed": "FINISHED",
    "stage_attempt_failed": "FAILED",
    "stage_attempt_preempted": "SCHEDULED",
    "stage_attempt_interrupted": "SCHEDULED",
}
PreparesData = Callable[[Recipe, Path, Display], dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """How the controller left the run: its phase (or `interrupted`), the process's exit status, one line of why."""

    phase: str
    exit_status: int
    message: str
    state: RunState


@dataclass
class _Controller:
    recipe: Recipe
    run_dir: Path
    launcher: Launcher
    journal: Journal
    display: Display
    state: RunState
    prepare: PreparesData
    watch: Watch | None = None
    interrupted: threading.Event = field(default_factory=threading.Event)


def run_curriculum(
    recipe: Recipe,
    run_dir: Path,
    launcher: Launcher,
    display: Display,
    prepare: PreparesData | None = None,
    request: dict[str, Any] | None = None,
) -> Outcome:
    """Run the recipe in the run directory, or go on where an earlier controller stopped.

    `request` is an event to append first: `resume_requested`, or `rerun_requested` with a stage. Raises LeaseHeld
    when another controller works here and InputError when the recipe changed in what has already started.
    """
    run_dir = Path(run_dir).absolute()
    names = [stage.name for stage in recipe.stages]
    if request and request.get("stage", names[0]) not in names:
        raise InputError(f"there is no stage {request['stage']}; the recipe's stages are {', '.join(names)}")
    request = _with_stages(recipe, request) if request else None
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "it is a file" if run_dir.is_file() else error.strerror
        raise InputError(f"the run directory {run_dir} cannot be made ({what}); name a folder that can be written") from error
    state = fold(names, read_journal(run_dir).events)
    if state.phase == "succeeded" and request is None and not changed_keys(stored_recipe(run_dir) or recipe, recipe):
        return Outcome("succeeded", 0, f"{mirror.place_of(run_dir)}: this run is complete; nothing to do", state)
    if state.phase == "new":
        refuse_foreign_recipe(run_dir)
    interrupted = threading.Event()
    mirror.require_conditions(run_dir)
    outlast_lease(run_dir, display.message)
    with mirror.following(run_dir, lost=lambda _: interrupted.set()) as follower, Journal(run_dir) as journal:
        state = fold(names, journal.events)
        if journal.torn:
            display.message(f"journal.jsonl ended in a torn line of {len(journal.torn)} characters, which was cut off")
        controller = _Controller(recipe, run_dir, launcher, journal, display, state, prepare or prepare_run_data, None, interrupted)
        _open_run(controller, request)
        if request is not None:
            _record(controller, request)
        finished = _at_rest(controller)
        if finished is not None:
            return Outcome(finished.phase, finished.exit_status, _rest_message(controller, finished), state)
        if state.phase != "new":
            _record(controller, {"event": "controller_started", "launcher": launcher.name})
        launcher.attach(run_dir)
        with listen_for_signals(controller.interrupted):
            outcome = _run(controller)
        if follower and follower.lost and outcome.phase == "interrupted":
            return replace(outcome, exit_status=follower.lost.exit_status, message=str(follower.lost))
        return outcome


def _open_run(controller: _Controller, request: dict[str, Any] | None) -> None:
    """Store the recipe of a new run; of an old one check what changed."""
    stored = stored_recipe(controller.run_dir)
    if stored is None:
        store_recipe(controller.run_dir, controller.recipe)
        return
    # A rerun from a stage makes that stage and those after it free to change again.
    asked = [request] if request and request["event"] == "rerun_requested" else []
    old_state = fold([stage.name for stage in stored.stages], [*controller.journal.events, *asked])
    changed = check_changes(stored, controller.recipe, old_state, controller.run_dir)
    if changed:
        store_recipe(controller.run_dir, controller.recipe)
        if controller.state.phase != "new":
            _record(controller, {"event": "recipe_changed", "keys": changed, "recipe_hash": recipe_hash(controller.recipe)})


def _at_rest(controller: _Controller) -> Finish | None:
    """The Finish of a run that only a person's request moves on."""
    state = controller.state
    if state.phase in ("new", "running") or state.attempts_in_flight:
        return None
    actions = machine.next_actions(controller.recipe, state, Observation(), time.time())
    return actions[0] if isinstance(actions[0], Finish) else None


def _rest_message(controller: _Controller, finished: Finish) -> str:
    hint = {
        "failed": "`terrace resume` tries it again",
        "paused": "`terrace resume` goes on",
        "suspended": "`terrace resume` goes on from the checkpoint",
    }.get(finished.phase)
    if finished.phase == "succeeded":
        return f"{mirror.place_of(controller.run_dir)}: this run is complete; nothing to do"
    why = f": {finished.message}" if finished.message else ""
    return f"{mirror.place_of(controller.run_dir)} is {finished.phase}{why}" + (f" ({hint})" if hint else "")


def _end_message(controller: _Controller, finished: Finish) -> str:
    if finished.phase == "succeeded":
        last = controller.state.stages[-1]
        weights = stage_directory(controller.run_dir, last.index, last.name) / "final"
        count = len(controller.state.stages)
        return f"{'the stage is' if count == 1 else f'all {count} stages are'} complete; the model is in {mirror.place_of(weights)}"
    return finished.message if finished.phase == "interrupted" else _rest_message(controller, finished)


def _run(controller: _Controller) -> Outcome:
    try:
        while True:
            _take_requests(controller)
            observation = _observe(controller)
            actions = machine.next_actions(controller.recipe, controller.state, observation, time.time())
            for action in actions:
                finished = _perform(controller, action)
                if finished is not None:
                    return Outcome(finished.phase, finished.exit_status, _end_message(controller, finished), controller.state)
            for stage in controller.state.attempts_in_flight:
                _follow(controller, stage)
    finally:
        phase = controller.state.phase
        if controller.watch:
            mlflow_status = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}.get(phase, "SCHEDULED")
            controller.watch.close(mlflow_status)
        controller.launcher.close()


def _observe(controller: _Controller) -> Observation:
    seen = tuple(controller.launcher.observe(stage.index, stage.name, stage.attempt) for stage in controller.state.attempts_in_flight)
    live = tuple(controller.launcher.live_attempts())
    return Observation(seen, live, controller.interrupted.is_set())


def _perform(controller: _Controller, action: Action) -> Finish | None:
    """Carry one action out. Returns the Finish that ends the loop."""
    match action:
        case Record(event):
            _record(controller, event)
        case Prepare():
            facts = controller.prepare(controller.recipe, controller.run_dir, controller.display)
            _record(controller, {"event": "data_prepared", **facts})
        case Clear(index, stage, rerun):
            move_aside(stage_directory(controller.run_dir, index, stage), rerun)
        case Launch(index, stage, attempt):
            controller.launcher.launch(LaunchRequest(index, stage, attempt, controller.run_dir))
        case Stop(index, stage, attempt, reason, force):
            controller.launcher.stop(index, stage, attempt, reason, force)
        case Wait(until, _):
            controller.interrupted.wait(max(0.0, min(POLL_SECONDS, until - time.time())))
            if controller.interrupted.is_set():
                time.sleep(min(POLL_SECONDS, 0.1))
        case Finish():
            return action
    return None


def _follow(controller: _Controller, stage: StageState) -> None:
    """Show and track the attempt in flight, launched by this controller or adopted from one before it."""
    if controller.watch is None:
        controller.watch = Watch(
            controller.recipe, controller.run_dir, controller.state, controller.display, lambda event: _record(controller, event)
        )
        controller.watch.start()
    if not controller.watch.follows(stage):
        controller.watch.begin_stage(stage)
    controller.watch.poll()


def _record(controller: _Controller, event: dict[str, Any]) -> None:
    """Append to the journal, then to the state; tell the person what matters."""
    if event["event"] == "run_started":
        event = {
            **event,
            "recipe": controller.recipe.name,
            "recipe_hash": recipe_hash(controller.recipe),
            "launcher": controller.launcher.name,
        }
    apply(controller.state, controller.journal.append(event))
    kind = event["event"]
    stage = controller.state.stage(event.get("stage"))
    if kind in ENDINGS and stage:
        if kind == "stage_completed":
            _follow(controller, stage)  # it may have run and ended while no controller looked
        if controller.watch:
            controller.watch.end_stage(stage, ENDINGS[kind])
    if line := describe(event):
        controller.display.message(line)


def describe(event: dict[str, Any]) -> str | None:
    """An event in words, for the person who watches; None for those of no interest."""
    stage, attempt = event.get("stage"), event.get("attempt")
    why = f": {event['message']}" if event.get("message") else ""
    match event["event"]:
        case "stage_attempt_started" if attempt > 1:
            return f"stage {stage}: attempt {attempt}"
        case "stop_requested":
            return f"stage {stage}: asked to stop; it saves a checkpoint first"
        case "handed_over":
            return f"stage {stage} starts from the weights of {event['from']}"
        case "stage_attempt_failed":
            return f"stage {stage}: attempt {attempt} failed ({event['kind']}, {event['reason']}){why}"
        case "stage_attempt_preempted" | "stage_attempt_interrupted":
            return f"stage {stage}: attempt {attempt} stopped{why}"
        case "stage_completed":
            return f"stage {stage} complete{_losses(event.get('result') or {})}"
        case "gate_missed" | "gate_passed":
            return f"stage {stage}: gate {event['event'][5:]}{why}"
        case "pause_requested" | "suspend_requested" | "cancel_requested" | "resume_requested":
            return event["event"].replace("_", " ")
        case "rerun_requested":
            return f"stage {stage} and those after it run again"
    return None


def _losses(result: dict[str, Any]) -> str:
    evaluation = result.get("evaluation") or {}
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    shown = [
        f"{kind} {before[kind]:.3f} -> {after[kind]:.3f}"
        for kind in after
        if isinstance(before.get(kind), float) and isinstance(after[kind], float)
    ]
    what = "held-out" if any("/" in kind for kind in after) else "held-out loss"  # an RL stage's names say what they are
    return f"; {what} {', '.join(shown)}" if shown else ""


def _take_requests(controller: _Controller) -> None:
    for path, request in pending_requests(controller.run_dir):
        if request.get("command") not in controller.state.commands:
            known = {key: request[key] for key in ("event", "command", "stage", "by") if key in request}
            _record(controller, _with_stages(controller.recipe, known))
        path.unlink(missing_ok=True)


def _with_stages(recipe: Recipe, request: dict[str, Any]) -> dict[str, Any]:
    """A rerun with every stage that runs again because it waits for that one."""
    return {**request, "stages": with_dependents(recipe, request["stage"])} if request["event"] == "rerun_requested" else request


def move_aside(folder: Path, rerun: int) -> None:
    """Keep what earlier runs of a stage wrote under `<folder>.rerun-<K>`. Idempotent: it is called again after a crash."""
    aside = folder.with_name(f"{folder.name}.rerun-{rerun}")
    if folder.exists() and not aside.exists():
        folder.rename(aside)
    mirror.move_folder(folder, aside)


def prepare_run_data(recipe: Recipe, run_dir: Path, display: Display) -> dict[str, Any]:
    """Ingest and index what is not yet, train or copy the tokenizer; what the journal should know of it. Says how many samples of a
    source were refused: they are listed by name, but whoever starts a run does not read that list unasked."""
    from terrace.data.prepare import prepare_data

    if any(taken_from(recipe, index) for index in range(len(recipe.stages))):
        from terrace.models.taken import check_taken  # a recipe of one model needs no torch here

        check_taken(recipe)
    mirror.fetch_folder(run_dir / "data", mirror.DATA_LAST)
    prepared = prepare_data(recipe, run_dir, display.activity)
    mirror.store_folder(run_dir / "data", mirror.DATA_LAST)
    kept = {name: len(index.ids) for name, index in prepared.sources.items()}
    refused = {name: dict(index.refused) for name, index in prepared.sources.items() if index.refused}
    sentences = refused_sentences(refused, kept)
    for name, sentence in zip(refused, sentences):
        display.message(f"{sentence}; each is named in {join(prepared.sources[name].folder, 'refused.jsonl')}")
    return {"sources": kept, **({"refused": refused, "message": "; ".join(sentences)} if refused else {})}


@contextmanager
def listen_for_signals(interrupted: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a checkpoint and an end; a second SIGINT ends at once. For the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, _frame: Any) -> None:
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
