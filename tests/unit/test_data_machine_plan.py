"""One planner for the ranks of a machine: each gets the hand that it would have dealt itself, and only one process packs."""

from __future__ import annotations

import threading

import pytest
from formula_source import FormulaSource, stage

from terrace.data.order.balance import CostModel
from terrace.data.order.plan import StagePlan
from terrace.data.stream import machine_plan
from terrace.data.stream.machine_plan import Planner, PlannerClient, PlannerServer
from terrace.errors import InputError

RANKS = 7  # of packs; this machine has five processes, of which two and two share theirs
LOCAL = [2, 2, 3, 3, 4]


def plan(**changes) -> StagePlan:
    sources = {source.name: source for source in (FormulaSource("a", 500), FormulaSource("b", 90))}
    return StagePlan(stage(**({"budget": {"epochs": 3}} | changes)), sources, 0, CostModel())


@pytest.fixture
def machine():
    planner = Planner(plan(), RANKS, LOCAL)
    server = PlannerServer(planner, len(LOCAL) - 1)
    clients = [PlannerClient(plan(), server.address, place) for place in range(1, len(LOCAL))]
    yield planner, clients
    for client in clients:
        client._connection.close()


def test_ranks_in_any_order_get_their_hands_and_pack_nothing(machine):
    planner, clients = machine
    whole = plan()
    assert [client.total_steps() for client in clients] == [whole.total_steps] * 4
    assert [client.plan.total_packs for client in clients] == [whole.total_steps * 14] * 4  # as many as the stage's steps hold
    found: dict[int, list] = {}

    def rank(place: int) -> None:  # the later places run ahead, as ranks with less to decode do
        ask = planner.hand if place == 0 else clients[place - 1].hand
        found[place] = [ask(step) for step in range(whole.total_steps)]

    threads = [threading.Thread(target=rank, args=(place,)) for place in range(len(LOCAL))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in range(whole.total_steps):
        dealt = whole.deal(step, RANKS)
        assert [found[place][step] for place in range(len(LOCAL))] == [dealt[rank] for rank in LOCAL]
    assert not planner._steps  # every hand was taken: nothing is kept
    assert [client.plan._windows for client in clients] == [{}] * 4
    assert clients[2].state(9) == whole.state(9)


def test_a_resumed_machine_goes_on_at_once_whoever_asks_first(machine):
    planner, clients = machine
    whole = plan()
    total = whole.total_steps
    state = whole.state(20)
    clients[3].restore(state)
    assert clients[3].hand(20) == whole.deal(20, RANKS)[4]
    assert min(planner.plan._windows) == state["window"] > 0
    assert clients[0].total_steps() == total
    planner.restore(state)
    assert planner.hand(20) == whole.deal(20, RANKS)[2]
    with pytest.raises(InputError, match="changed since"):
        clients[0].restore(plan(sequence_length=2048).state(3))


def test_a_rank_that_asks_again_or_far_behind_is_answered(machine, monkeypatch):
    planner, clients = machine
    monkeypatch.setattr(machine_plan, "KEPT_STEPS", 3)
    whole = plan()
    for step in range(9):
        planner.hand(step)
    assert len(planner._steps) == 3
    assert clients[0].hand(0) == clients[0].hand(0) == whole.deal(0, RANKS)[2]


def test_what_goes_wrong_with_the_planner_reaches_the_rank_that_asks():
    server = PlannerServer(Planner(plan(batch={"packs": 15}), RANKS, LOCAL), 1)
    client = PlannerClient(plan(), server.address, 1)
    with pytest.raises(InputError, match="cannot be dealt evenly"):
        client.hand(0)
    client._connection.close()
    with pytest.raises(RuntimeError, match="the planner of this machine is gone"):
        client.hand(0)
