"""The controller with a launcher that needs no Ray: resume, requests, changed recipes, and a kill at every single point."""

from __future__ import annotations

import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from curriculum_launcher import CountingLauncher, Killed
from fakes import tiny_recipe

from terrace import cli
from terrace.cluster.attempt_files import write_atomic
from terrace.curriculum import journal as journal_module
from terrace.curriculum import lease as lease_module
from terrace.curriculum import run as run_module
from terrace.curriculum.journal import Journal, LeaseHeld, lease_holder, leave_request, read_journal
from terrace.curriculum.run import Outcome, run_curriculum
from terrace.curriculum.status import run_status
from terrace.errors import InputError
from terrace.track.progress import Display

WORDS = " " + " ".join(f"stage-{letter}.{step}" for letter in "abcd" for step in range(3))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """No MLflow and no waiting: the controller itself is under test."""
    monkeypatch.setattr(run_module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(run_module.Watch, "start", lambda self: None)
    monkeypatch.setattr(journal_module.os, "fsync", lambda descriptor: None)


def run(tmp_path: Path, launcher: CountingLauncher, request: dict[str, Any] | None = None, output: io.StringIO | None = None) -> Outcome:
    display = Display(output or io.StringIO(), terminal=False)
    return run_curriculum(launcher.recipe, tmp_path, launcher, display, prepare=lambda *_: {}, request=request)


def names(tmp_path: Path) -> list[str]:
    return [event["event"] for event in read_journal(tmp_path).events]


def weights(tmp_path: Path) -> str:
    return (tmp_path / "stages" / "04-stage-d" / "final" / "weights").read_text()


def test_four_stages_run_and_a_finished_run_does_nothing(tmp_path: Path):
    recipe = tiny_recipe(4)
    outcome = run(tmp_path, CountingLauncher(recipe))
    assert (outcome.phase, outcome.exit_status) == ("succeeded", 0)
    assert weights(tmp_path) == WORDS
    before = read_journal(tmp_path)
    again = CountingLauncher(recipe)
    assert run(tmp_path, again).exit_status == 0
    assert again.launched == []
    assert read_journal(tmp_path) == before


def _kill_at(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launcher: CountingLauncher) -> bool:
    """Run until the `number`-th point: before and after every journal write, every launch, every step. False: it ended before."""
    seen = 0

    def point(_what: str) -> None:
        nonlocal seen
        if seen == number:
            seen += 1
            raise Killed
        seen += 1

    real = Journal.append

    def append(self: Journal, event: dict[str, Any]) -> dict[str, Any]:
        point("before")
        complete = real(self, event)
        point("after")
        return complete

    launcher.hook = point
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        try:
            run(tmp_path, launcher)
        except Killed:
            return True
    return False


def test_a_kill_at_every_point_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_recipe(4)
    number = 0
    while True:
        folder = tmp_path / str(number)
        folder.mkdir()
        if not _kill_at(number, monkeypatch, folder, CountingLauncher(recipe)):
            break
        outcome = run(folder, CountingLauncher(recipe))
        assert outcome.exit_status == 0, f"killed at point {number}"
        assert weights(folder) == WORDS
        recorded = names(folder)
        assert recorded.count("stage_completed") == 4
        assert recorded.count("run_completed") == recorded.count("run_started") == 1
        assert recorded.count("handed_over") == 3
        number += 1
    assert number > 60, "there are that many points in a four-stage run"


def test_killed_again_and_again_it_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_recipe(4)
    for number in [5, 9, 3, 12, 4, 4, 7, 30, 2, 11, 1, 8, 0]:
        _kill_at(number, monkeypatch, tmp_path, CountingLauncher(recipe))
    assert run(tmp_path, CountingLauncher(recipe)).exit_status == 0
    assert weights(tmp_path) == WORDS
    assert names(tmp_path).count("stage_completed") == 4


def test_failures_are_tried_again_until_the_budget_is_spent(tmp_path: Path):
    recipe = tiny_recipe(2, failure={"max_restarts": 1, "backoff_seconds": 0.01})
    launcher = CountingLauncher(recipe, outcomes={("stage-b", 1): "program", ("stage-b", 2): "infrastructure", ("stage-b", 3): "program"})
    outcome = run(tmp_path, launcher)
    assert (outcome.phase, outcome.exit_status) == ("failed", 1)
    assert "stage stage-b, attempt 3: told to fail" in outcome.message
    assert "terrace resume" in outcome.message
    again = CountingLauncher(recipe)
    assert run(tmp_path, again).exit_status == 1
    assert again.launched == [], "a terminal run never restarts by itself"
    resumed = CountingLauncher(recipe)
    assert run(tmp_path, resumed, {"event": "resume_requested"}).exit_status == 0
    assert resumed.launched == [("stage-b", 4)]


def test_wrong_input_ends_with_status_2(tmp_path: Path):
    launcher = CountingLauncher(tiny_recipe(2), outcomes={("stage-a", 1): "input"})
    outcome = run(tmp_path, launcher)
    assert outcome.exit_status == 2
    assert launcher.launched == [("stage-a", 1)]


@pytest.mark.parametrize("kind", ["pause", "suspend", "cancel"])
def test_requests_reach_a_living_controller(tmp_path: Path, kind: str):
    recipe = tiny_recipe(3)
    launcher = CountingLauncher(recipe)
    asked = []

    def ask(what: str) -> None:
        if what == "after a step" and not asked:
            asked.append(leave_request(tmp_path, {"event": f"{kind}_requested"}))

    launcher.hook = ask
    outcome = run(tmp_path, launcher)
    assert outcome.phase == {"pause": "paused", "suspend": "suspended", "cancel": "cancelled"}[kind]
    assert outcome.exit_status == (1 if kind == "cancel" else 143)
    completed = names(tmp_path).count("stage_completed")
    assert completed == (1 if kind == "pause" else 0)
    assert run(tmp_path, CountingLauncher(recipe)).phase == outcome.phase, "it stays so until someone resumes it"
    if kind != "cancel":
        assert run(tmp_path, CountingLauncher(recipe), {"event": "resume_requested"}).exit_status == 0
        assert names(tmp_path).count("stage_completed") == 3


def test_a_request_is_taken_once_although_its_file_survives(tmp_path: Path):
    recipe = tiny_recipe(2)
    run(tmp_path, CountingLauncher(recipe))
    with Journal(tmp_path) as journal:
        journal.append({"event": "rerun_requested", "stage": "stage-b", "command": "1.0-1"})
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "1.0-1.json").write_text('{"event": "rerun_requested", "stage": "stage-b", "command": "1.0-1"}')
    assert run(tmp_path, CountingLauncher(recipe)).exit_status == 0
    assert names(tmp_path).count("rerun_requested") == 1


def test_rerun_from_a_stage_moves_its_files_aside(tmp_path: Path):
    recipe = tiny_recipe(4)
    run(tmp_path, CountingLauncher(recipe))
    launcher = CountingLauncher(recipe)
    assert run(tmp_path, launcher, {"event": "rerun_requested", "stage": "stage-c"}).exit_status == 0
    assert launcher.launched == [("stage-c", 2), ("stage-d", 2)]
    assert (tmp_path / "stages" / "03-stage-c.rerun-1" / "result.json").is_file()
    assert weights(tmp_path) == WORDS
    with pytest.raises(InputError, match="stage-z"):
        run(tmp_path, launcher, {"event": "rerun_requested", "stage": "stage-z"})


def test_what_has_started_cannot_change_and_what_has_not_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_recipe(3)
    launcher = CountingLauncher(recipe)

    def stop_in_b(what: str) -> None:
        if what == "after a step" and launcher.launched[-1][0] == "stage-b":
            raise Killed

    launcher.hook = stop_in_b
    with pytest.raises(Killed):
        run(tmp_path, launcher)

    def changed(index: int, **update: Any) -> Any:
        stages = list(recipe.stages)
        stages[index] = stages[index].model_copy(update=update)
        return recipe.model_copy(update={"stages": stages})

    budget = recipe.stages[0].budget.model_copy(update={"steps": 9})
    for index in (0, 1):
        with pytest.raises(InputError, match=rf"stages\.{index}\.budget\.steps"):
            run(tmp_path, CountingLauncher(changed(index, budget=budget)))
    with pytest.raises(InputError, match=r"model\.seed"):
        run(tmp_path, CountingLauncher(recipe.model_copy(update={"model": recipe.model.model_copy(update={"seed": 7})})))
    renamed = tiny_recipe(2)
    with pytest.raises(InputError, match=r"stages\.1"):
        run(tmp_path, CountingLauncher(renamed.model_copy(update={"stages": [recipe.stages[0], recipe.stages[2]]})))
    resources = recipe.stages[1].resources.model_copy(update={"workers": 2})
    allowed = changed(2, budget=budget)
    allowed = allowed.model_copy(
        update={"stages": [allowed.stages[0], allowed.stages[1].model_copy(update={"resources": resources}), allowed.stages[2]]}
    )
    assert run(tmp_path, CountingLauncher(allowed)).exit_status == 0
    event = next(event for event in read_journal(tmp_path).events if event["event"] == "recipe_changed")
    assert event["keys"] == ["stages.1.resources.workers", "stages.2.budget.steps"]


def test_a_rerun_frees_its_stages_to_change(tmp_path: Path):
    recipe = tiny_recipe(2)
    run(tmp_path, CountingLauncher(recipe))
    budget = recipe.stages[0].budget.model_copy(update={"steps": 9})
    changed = recipe.model_copy(update={"stages": [recipe.stages[0], recipe.stages[1].model_copy(update={"budget": budget})]})
    with pytest.raises(InputError):
        run(tmp_path, CountingLauncher(changed))
    launcher = CountingLauncher(changed)
    assert run(tmp_path, launcher, {"event": "rerun_requested", "stage": "stage-b"}).exit_status == 0
    assert launcher.launched == [("stage-b", 2)]


def test_status_says_where_it_stands_and_why_it_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tiny_recipe(2, gates=[{"metric": "eval/caption/loss", "below": 0.5}])
    outcome = run(tmp_path, CountingLauncher(recipe))
    assert (outcome.phase, outcome.exit_status) == ("paused", 1)
    status = run_status(tmp_path)
    assert (status["phase"], status["reason"]) == ("paused", "GateMissed")
    assert "eval/caption/loss" in status["message"]
    assert [stage["phase"] for stage in status["stages"]] == ["completed", "pending"]
    assert lease_holder(tmp_path) is None
    assert cli.main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "1/2 stages" in shown
    assert "missed its gate" in shown


def test_commands_without_a_controller_go_into_the_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tiny_recipe(2)
    launcher = CountingLauncher(recipe)

    def stop(what: str) -> None:
        if what == "after a step":
            raise Killed

    launcher.hook = stop
    with pytest.raises(Killed):
        run(tmp_path, launcher)
    assert cli.main(["suspend", str(tmp_path)]) == 0
    assert names(tmp_path)[-1] == "suspend_requested"
    assert run(tmp_path, CountingLauncher(recipe)).phase == "suspended"
    assert cli.main(["cancel", str(tmp_path)]) == 0
    assert run(tmp_path, CountingLauncher(recipe)).phase == "cancelled"
    assert cli.main(["pause", str(tmp_path)]) == 2
    assert "cancelled" in capsys.readouterr().err


@pytest.mark.parametrize("renewed", [False, True])
def test_a_run_whose_controller_was_another_machine_waits_for_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: bool):
    """It goes on where nobody renews the lease; else it leaves, and has launched nothing."""
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 0.05)
    held = {"token": 4, "host": "another-machine", "pid": 7, "process_started": 1.0, "acquired": 50.0, "renewed": 50.0, "expires": 50.3}
    file = tmp_path / lease_module.LEASE_NAME
    file.write_text(json.dumps(held))
    if renewed:
        threading.Timer(0.1, write_atomic, (file, json.dumps({**held, "renewed": 50.1, "expires": 50.4}))).start()
    launcher, output = CountingLauncher(tiny_recipe(4)), io.StringIO()
    if renewed:
        with pytest.raises(LeaseHeld, match="process 7 on another-machine"):
            run(tmp_path, launcher, output=output)
        assert launcher.launched == []
    else:
        assert run(tmp_path, launcher, output=output).phase == "succeeded"
        assert {event["token"] for event in read_journal(tmp_path).events} == {5}
    assert "process 7 on another-machine had this run and may be gone" in output.getvalue()
