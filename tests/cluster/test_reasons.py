"""Whose word counts on how an attempt ended: the program's own report first, Ray's status second, KubeRay's reason third."""

from __future__ import annotations

import pytest
from cluster_world import condition, tiny_curriculum

from terrace.cluster.manifests import SUBMITTER_RETRIES
from terrace_operator.observe import classify, exit_code

UNLUCKY = ["SubmissionFailed", "JobStatusCheckTimeoutExceeded", "JobDeploymentStatusTransitionGracePeriodExceeded", "DeadlineExceeded"]


@pytest.mark.parametrize("closes", [*UNLUCKY, "AppFailed", "waits", "never"])
def test_a_program_that_says_exit_1_has_failed_itself_whatever_kuberay_says(bench, closes):
    behaviour = {"exit": 1, "message": "loss became NaN", "closes": closes}
    policy = {"maxRestarts": 1, "maxInfraRestarts": 6, "backoffSeconds": 0.2}
    bench.store.create(tiny_curriculum(behaviour=behaviour, failurePolicy=policy))
    status = bench.run_until("Failed", seconds=30)
    stage = status["stages"][0]
    assert (stage["attempt"], stage["restarts"], stage["infraRestarts"]) == (2, 2, 0)
    failed = condition(status, "Failed")
    assert failed["reason"] == "ProgramFailuresSpent"
    assert "loss became NaN" in failed["message"]


@pytest.mark.parametrize("closes", [*UNLUCKY, "waits", "never"])
def test_a_stage_that_reported_its_result_is_done_whatever_kuberay_says(bench, closes):
    policy = {"maxRestarts": 0, "maxInfraRestarts": 0}
    bench.store.create(tiny_curriculum(behaviour={"closes": closes}, failurePolicy=policy))
    status = bench.run_until("Succeeded", seconds=200)
    assert [(stage["attempt"], stage["restarts"], stage["infraRestarts"]) for stage in status["stages"]] == [(1, 0, 0), (1, 0, 0)]
    assert [name for name, _, _ in bench.cluster.launches] == ["tiny-s0-1", "tiny-s1-1"]  # and nothing ran twice


def test_wrong_input_is_not_tried_again_when_kuberay_says_submission_failed(bench):
    bench.store.create(tiny_curriculum(behaviour={"exit": 2, "message": "no such bucket", "closes": "SubmissionFailed"}))
    status = bench.run_until("Failed")
    assert status["stages"][0]["attempt"] == 1
    assert condition(status, "Failed")["reason"] == "InputWrong"


def test_a_failed_program_gives_its_gpus_back_before_kuberay_closes_its_job(bench):
    bench.store.create(tiny_curriculum(behaviour={"exit": 1, "closes": "waits"}, failurePolicy={"maxRestarts": 0, "backoffSeconds": 0.2}))
    bench.run_until("Failed", seconds=10)
    bench.run(2.0)
    assert bench.jobs() == []


def test_a_lost_submitter_does_not_end_the_attempt(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 30, "step_seconds": 0.1}))
    for _ in range(SUBMITTER_RETRIES):
        bench.run(0.5)
        bench.cluster.evict_submitter("tiny-s0-1")
    status = bench.run_until("Succeeded")
    assert [(stage["attempt"], stage["infraRestarts"]) for stage in status["stages"]] == [(1, 0), (1, 0)]


def test_a_submitter_lost_too_often_is_an_infrastructure_failure(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 30, "step_seconds": 0.2}, failurePolicy={"backoffSeconds": 0.2}))
    for _ in range(SUBMITTER_RETRIES + 1):
        bench.run(0.5)
        bench.cluster.evict_submitter("tiny-s0-1")
    bench.run(1.0)
    stage = bench.status()["stages"][0]
    assert (stage["attempt"], stage["restarts"], stage["infraRestarts"]) == (2, 0, 1)
    assert any("SubmissionFailed" in message for reason, message in bench.events() if reason == "AttemptFailed")


def test_a_replaced_head_is_the_infrastructures_and_the_same_attempt_where_it_is_submitted_anew(bench):
    policy = {"maxRestarts": 0, "backoffSeconds": 0.2}
    bench.store.create(tiny_curriculum(behaviour={"steps": 40, "step_seconds": 0.1}, failurePolicy=policy))
    bench.run(2.0)
    bench.cluster.replace_head("tiny-s0-1", bench.clock.forward)
    bench.run(1.0)
    assert bench.status()["stages"][0]["attempt"] == 1
    assert bench.cluster.launches[-1][0] == "tiny-s0-1"
    assert bench.cluster.launches[-1][1] > 0  # from its checkpoint
    bench.cluster.submitters["tiny-s0-1"] = SUBMITTER_RETRIES
    bench.cluster.replace_head("tiny-s0-1", bench.clock.forward)  # AppFailed: Submitter completed but Ray job not found in RayCluster.
    status = bench.run_until("Succeeded")
    stage = status["stages"][0]
    assert (stage["attempt"], stage["restarts"], stage["infraRestarts"]) == (2, 0, 1)
    assert any("HeadLost" in message for reason, message in bench.events() if reason == "AttemptFailed")


def test_a_preempted_attempt_whose_node_is_dead_is_replaced(bench):
    policy = {"fenceTimeoutSeconds": 60, "backoffSeconds": 0.2}
    bench.store.create(tiny_curriculum(queue={"name": "training"}, behaviour={"steps": 20}, failurePolicy=policy))
    bench.run(1.0)
    bench.cluster.dead.add("tiny-s0-1")
    bench.cluster.preempt("tiny-s0-1")  # its pods never end, so it is never Suspended
    bench.run(60.0, step=0.5)
    assert bench.status()["stages"][0]["attempt"] == 1
    bench.run(140.0, step=0.5)
    status = bench.run_until("Succeeded")
    assert (status["stages"][0]["attempt"], status["stages"][0]["infraRestarts"]) == (2, 1)
    assert any("OldPodsTerminating" in message for reason, message in bench.events() if reason == "AttemptFailed")


def test_a_view_of_before_an_attempt_does_not_delete_it(bench):
    """A late watch event shows the Curriculum as it was before its attempt was recorded: the attempt is no stranger's."""
    bench.store.create(tiny_curriculum(behaviour={"steps": 30, "step_seconds": 0.1}))
    bench.deliver()
    old = None
    for _ in range(30):
        before = bench.store.objects["Curriculum"]["tiny"]
        bench.run(0.1)
        if bench.jobs() and old is None:
            old = before
    bench.controller.cache.store("Curriculum", old)
    bench.controller.handle("tiny")
    bench.run(1.0)
    assert bench.store.calls.get("delete RayJob", 0) == 0
    assert bench.run_until("Succeeded")["restarts"] == 0


CLUSTER = {"rayClusterName": "c"}


@pytest.mark.parametrize(
    ("status", "report", "expected"),
    [
        ({"reason": "AppFailed", "message": "Job entrypoint command failed with exit code 1"}, None, ("program", "AppFailed")),
        ({"reason": "AppFailed", "message": "Submitter completed but Ray job not found in RayCluster."}, None,
         ("infrastructure", "HeadLost")),
        ({"reason": "SubmissionFailed", "message": "submitter failed with exit code 1"}, None, ("infrastructure", "SubmissionFailed")),
        ({"reason": "SubmissionFailed"}, {"status": 1}, ("program", "AppFailed")),
        ({"reason": "SubmissionFailed"}, {"status": 127}, ("program", "AppFailed")),
        ({"reason": "SubmissionFailed"}, {"status": 2}, ("input", "InputWrong")),
        ({"reason": "AppFailed"}, {"status": 137}, ("infrastructure", "Killed")),
        ({"reason": "AppFailed"}, {"status": 139}, ("program", "AppFailed")),
        ({"reason": "JobStatusCheckTimeoutExceeded"}, None, ("infrastructure", "JobStatusCheckTimeoutExceeded")),
        ({"reason": "AppFailed", "jobStatus": "STOPPED"}, None, ("infrastructure", "AppFailed")),
        ({"reason": "", "message": "The supervisor actor died"}, None, ("infrastructure", "HeadLost")),
    ],
)  # fmt: skip
def test_classification(status, report, expected):
    code, _ = exit_code({**CLUSTER, **status}, {"exit": report, "cluster": "c"} if report else None)
    assert classify(status, code) == expected


def test_the_end_of_an_older_start_of_the_attempt_does_not_count():
    assert exit_code({"rayClusterName": "new"}, {"exit": {"status": 1}, "cluster": "old"}) == (None, "")
