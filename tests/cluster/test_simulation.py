"""The simulation of many curricula: no invariant is ever broken, and the cost does not grow with their number."""

from __future__ import annotations

import logging

import pytest
from simulation import Simulation
from simulation_checks import LIMITS
from simulation_table import figures


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_curricula_with_everything_that_goes_wrong():
    run = Simulation(25, seed=3).run()
    assert run.broken == []
    assert len(run.finished) == 25
    assert run.started > 25 * 8  # there were failures to recover from
    for what in ("exit 1", "node dies", "preempted", "deleted by hand", "operator restarts", "watch events lost", "API errors met",
                 "closed as SubmissionFailed", "closed as waits", "closed as never", "submitter lost", "head replaced", "kinds absent",
                 "preempted by priority", "quota reclaimed by its owner", "started beside another branch"):  # fmt: skip
        assert run.counts[what] > 0, what


def test_simulation_notices_two_live_attempts(monkeypatch):
    """Break the rule once: without the wait for the old attempt's end, the invariant must fail."""
    from terrace_operator import observe

    monkeypatch.setattr(observe, "is_fenced", lambda spec, world, name: True)
    run = Simulation(12, seed=3, wall_limit=40_000).run()
    assert any("lives" in text for text in run.broken)


def test_simulation_notices_an_overspent_budget(monkeypatch):
    from terrace.curriculum import machine

    monkeypatch.setattr(machine, "_budget_spent", lambda failure, stage: None)
    monkeypatch.setitem(LIMITS, "maxRestarts", 0)
    run = Simulation(10, seed=3, wall_limit=40_000).run()
    assert any("budget overspent" in text for text in run.broken)


def test_simulation_notices_a_reason_that_is_believed_before_the_program(monkeypatch):
    """Break the rule once: where KubeRay's reason decides first, programs' failures are counted as the infrastructure's."""
    from terrace_operator import observe

    monkeypatch.setattr(observe, "PROGRAM_EXITS", range(0))
    run = Simulation(12, seed=3, wall_limit=20_000).run()
    assert any("said exit 1, and" in text for text in run.broken)


def test_simulation_notices_a_finished_stage_that_runs_again(monkeypatch):
    from terrace_operator import observe

    monkeypatch.setattr(observe, "is_done", lambda report: False)
    run = Simulation(12, seed=3, wall_limit=20_000).run()
    assert any("starts again after its success" in text for text in run.broken)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_curricula_and_flat_cost():
    small, large = Simulation(100, seed=1).run(), Simulation(1000, seed=1).run()
    assert small.broken == large.broken == []
    assert large.started >= 9_000
    few, many = figures(small), figures(large)
    for what in ("reconciles per attempt", "API calls per attempt (without events)"):
        assert many[what] < 1.15 * few[what]
