"""What the operator asks of the API server when nothing happens: bounded, whatever the number of curricula."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from cluster_world import Bench, tiny_curriculum
from fake.server import Server
from harness import FakeHarness

SLOW = {"steps": 4, "step_seconds": 100_000}
STATES = {
    "queued": ({"queue": {"name": "training"}}, SLOW, "Queued"), "running": ({}, SLOW, "Running"),
    "paused": ({"paused": True}, SLOW, "Paused"), "succeeded": ({}, {}, "Succeeded"),
    "failed": ({"failurePolicy": {"maxRestarts": 0}}, {"exit": 1}, "Failed"),
    "refused": ({"runtime": {"image": "i", "terminationGraceSeconds": 20}}, {}, "Pending"),
}  # fmt: skip


@pytest.mark.parametrize("state", STATES)
def test_a_curriculum_of_which_nothing_is_new_costs_no_call(crd, state):
    spec, behaviour, phase = STATES[state]
    bench = Bench(crd)
    bench.cluster.quota = 0
    bench.store.create(tiny_curriculum(behaviour=behaviour, **spec))
    bench.run(20.0)
    assert bench.status().get("phase") == phase
    before = Counter(bench.store.calls)
    # Every look that its own appointments ask for, in 25 minutes without an event (after half an hour silence is a stall).
    due = bench.clock.forward
    end = due + 1500.0
    while due < end:
        bench.clock.advance(due - bench.clock.forward)
        again = bench.controller.handle("tiny")
        due = end if again is None else due + again
    made = Counter(bench.store.calls) - before
    assert sum(made.values()) == 0, made


@pytest.mark.slow  # two minutes of real time
def test_requests_of_an_idle_operator(crd, tmp_path, capsys):
    with Server(crd, namespace="terrace") as server:
        harness = FakeHarness(server, tmp_path)
        harness.lease_seconds = 15.0
        harness.start()
        try:
            names = [harness.create("idle", behaviour=SLOW) for _ in range(20)]
            for name in names:
                harness.until(name, lambda status: status["phase"] == "Running", "running", 60.0)
            time.sleep(20)
            server.requests.clear()
            time.sleep(120)
            mine = [request for request in server.requests if "terrace-operator" in request[0]]
            leases = [request for request in mine if "leases" in request[2]]
            rest = Counter((method, path.rsplit("/", 1)[-1]) for _, method, path, _ in mine if "leases" not in path)
            with capsys.disabled():
                print(f"\n20 idle curricula, 2 minutes: {len(leases)} for the lease, {sum(rest.values())} others {dict(rest)}")
            assert len(leases) <= 2 * 2 * 60 / (15 / 4) + 4
            assert sum(rest.values()) <= 16  # one list and one new watch per kind every five minutes
        finally:
            harness.stop()
