"""A cluster without KubeRay or Kueue: said in condition, event and message, with how to install it; and everything goes on then."""

from __future__ import annotations

import pytest
from cluster_world import condition, tiny_curriculum
from fake.server import Server
from harness import FakeHarness

from terrace.cluster.kubernetes import describe
from terrace_operator.conditions import quota_message

QUEUE = {"name": "training"}


def events(bench, reason):
    return [message for found, message in bench.events() if found == reason]


ABSENT = [("RayJob", "KubeRayAbsent", "install KubeRay"), ("Workload", "KueueAbsent", "install Kueue")]


@pytest.mark.parametrize(("kind", "reason", "how"), ABSENT)
def test_an_absent_kind_is_said_and_waited_for(bench, kind, reason, how):
    bench.store.absent.add(kind)
    bench.controller.resync()
    bench.store.create(tiny_curriculum(queue=QUEUE))
    bench.run(30.0)
    status = bench.status()
    assert status["phase"] == "Pending"
    for name, value in (("Progressing", "False"), ("Degraded", "True")):
        found = condition(status, name)
        assert (found["status"], found["reason"]) == (value, reason)
        assert how in found["message"]
    assert how in describe(status)
    assert len(events(bench, reason)) == 1  # told once, not every minute
    assert bench.store.objects.get("RayJob", {}) == {}
    bench.store.absent.clear()
    bench.controller.resync()
    status = bench.run_until("Succeeded")
    assert [(stage["attempt"], stage["infraRestarts"]) for stage in status["stages"]] == [(1, 0), (1, 0)]
    assert condition(status, "Degraded")["status"] == "False"


def test_without_a_queue_kueue_is_not_missed(bench):
    bench.store.absent.add("Workload")
    bench.controller.resync()
    bench.store.create(tiny_curriculum())
    bench.run_until("Succeeded")


def test_a_kind_that_vanishes_under_a_running_attempt_is_no_failure_of_it(bench):
    policy = {"maxInfraRestarts": 1, "backoffSeconds": 0.2}
    bench.store.create(tiny_curriculum(behaviour={"steps": 40, "step_seconds": 0.1}, failurePolicy=policy))
    bench.run(2.0)
    for name in list(bench.store.objects["RayJob"]):  # deleting a CRD deletes its objects
        bench.store._remove("RayJob", bench.store.objects["RayJob"][name])
    bench.store.absent.add("RayJob")
    bench.run(20.0)
    assert condition(bench.status(), "Progressing")["reason"] == "KubeRayAbsent"
    assert bench.status()["restarts"] == 0
    bench.store.absent.clear()
    bench.controller.resync()
    assert bench.run_until("Succeeded")["stages"][0]["infraRestarts"] == 1  # its RayJob was lost, once


def test_a_curriculum_can_be_cancelled_while_kuberay_is_absent(bench):
    bench.store.absent.add("RayJob")
    bench.controller.resync()
    bench.store.create(tiny_curriculum())
    bench.run(1.0)
    bench.edit(cancelled=True)
    assert condition(bench.run_until("Failed"), "Failed")["reason"] == "Cancelled"


def test_a_kuberay_that_does_not_look_is_noticed(bench):
    bench.cluster.tick = lambda now: None
    bench.store.create(tiny_curriculum())
    bench.run(130.0, step=0.5)
    degraded = condition(bench.status(), "Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "KubeRaySilent")
    assert len(events(bench, "KubeRaySilent")) == 1


def test_the_operator_finds_kuberay_when_it_is_installed_later(crd, tmp_path, monkeypatch):
    """As a process: its watches begin anew, since kopf looks for kinds only once."""
    with Server(crd, namespace="terrace") as server:
        server.store.absent |= {"RayJob", "Workload"}
        harness = FakeHarness(server, tmp_path)
        harness.start()
        try:
            name = harness.create("early", behaviour={"steps": 3})
            harness.until(name, lambda status: condition(status, "Progressing").get("reason") == "KubeRayAbsent", "told")
            server.store.absent.clear()
            status = harness.until(name, "Succeeded", patience=60.0)
            assert status["restarts"] == 0
        finally:
            harness.stop()


# ---------------------------------------------------------------- what Kueue can say


def waiting(**workload):
    job = {"metadata": {"name": "tiny-s0-1", "labels": {"kueue.x-k8s.io/queue-name": "training"}}, "spec": {"suspend": True}}
    return quota_message(job, {"metadata": {"name": "rayjob-tiny"}, "spec": {}, "status": {}} | workload)


def conditions(*found):
    return {"status": {"conditions": [dict(zip(("type", "status", "reason", "message"), values)) for values in found]}}


@pytest.mark.parametrize(
    ("workload", "reason", "says"),
    [
        (conditions(("QuotaReserved", "False", "Inadmissible", "LocalQueue training doesn't exist")), "Inadmissible", "doesn't exist"),
        (conditions(("QuotaReserved", "False", "Pending", "insufficient quota")), "Pending", "insufficient"),
        (conditions(("Evicted", "True", "PodsReadyTimeout", "Exceeded the PodsReady timeout")), "EvictedPodsReadyTimeout", "PodsReady"),
        (conditions(("Evicted", "True", "ClusterQueueStopped", "stopped")), "EvictedClusterQueueStopped", "stopped"),
        (conditions(("Evicted", "True", "DeactivatedDueToRequeuingLimitExceeded", "limit")), "EvictedDeactivated", "limit"),
        ({**conditions(("Evicted", "True", "Deactivated", "off")), "spec": {"active": False}}, "EvictedDeactivated", "kubectl patch"),
        (conditions(("QuotaReserved", "False", "no word at all!", "x")), "Pending", "x"),
        ({}, "NoWorkload", "is it installed"),
    ],
)  # fmt: skip
def test_what_kueue_says_reaches_the_condition(workload, reason, says):
    found = waiting(**workload)
    assert (found.status, found.reason) == ("False", reason)
    assert says in found.message


@pytest.mark.parametrize(("reason", "text"), [("Inadmissible", "LocalQueue training doesn't exist"), ("Deactivated", "requeued too often")])
def test_what_waiting_does_not_mend_is_not_called_waiting(bench, reason, text):
    bench.cluster.quota = 0
    bench.cluster.refusal = (reason, text)
    bench.store.create(tiny_curriculum(queue=QUEUE))
    bench.run(2.0)
    expected = {"Inadmissible": "Inadmissible", "Deactivated": "EvictedDeactivated"}[reason]
    progressing = condition(bench.status(), "Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", expected)
    assert text in progressing["message"]
    assert bench.status()["phase"] == "Queued"
    assert len(events(bench, expected)) == 1
    bench.cluster.quota, bench.cluster.refusal = None, None
    bench.run_until("Succeeded")
