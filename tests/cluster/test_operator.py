"""The operator's decisions on the fake cluster, with time under control: what each kind of trouble leads to."""

from __future__ import annotations

import itertools
import json

import pytest
from cluster_world import condition, summary, tiny_curriculum, tiny_stage

QUEUE = {"name": "training", "priorityClass": "high"}


def five_stages():
    return [tiny_stage(name) for name in ("warmup", "align", "pretrain", "long-sft", "rl")]


def test_five_stages_run_in_order_to_succeeded(bench):
    bench.store.create(tiny_curriculum(stages=five_stages()))
    status = bench.run_until("Succeeded")
    assert status["stagesDone"] == "5/5"
    assert bench.jobs() == [f"tiny-s{index}-1" for index in range(5)]
    started = [message for reason, message in bench.events() if reason == "StageStarted"]
    assert started == [f"stage {stage['name']}, attempt 1" for stage in five_stages()]
    assert condition(status, "Succeeded")["status"] == "True"
    assert condition(status, "Failed")["status"] == "False"


def test_program_failures_spend_their_budget_then_the_curriculum_fails_for_good(bench):
    behaviour = {"stages": {"align": {"exit": 1, "message": "CUDA error: an illegal memory access"}}}
    bench.store.create(tiny_curriculum(behaviour=behaviour, failurePolicy={"maxRestarts": 2, "backoffSeconds": 0.2}))
    status = bench.run_until("Failed")
    align = status["stages"][1]
    assert (align["attempt"], align["restarts"], align["infraRestarts"]) == (3, 3, 0)
    failed = condition(status, "Failed")
    assert failed["reason"] == "ProgramFailuresSpent"
    assert "max_restarts is 2" in failed["message"]
    assert "illegal memory access" in failed["message"]
    before = dict(bench.store.calls)
    for name in bench.jobs():  # children of a terminal curriculum vanish: nothing starts again
        bench.store.delete("RayJob", name)
    bench.run(30.0)
    assert bench.jobs() == []
    assert bench.store.calls["create RayJob"] == before["create RayJob"] == 4
    bench.edit(resumeToken="again")  # only a person's word starts it again
    bench.run(1.0)
    assert bench.status()["stages"][1]["attempt"] > 3


def test_wrong_input_is_not_tried_again(bench):
    bench.store.create(tiny_curriculum(behaviour={"exit": 2, "message": "data.sources.captions: no such bucket"}))
    status = bench.run_until("Failed")
    assert status["stages"][0]["attempt"] == 1
    assert condition(status, "Failed")["reason"] == "InputWrong"
    assert "no such bucket" in condition(status, "Failed")["message"]


def test_backoff_doubles_up_to_its_cap(bench):
    bench.store.create(tiny_curriculum(
        behaviour={"exit": 1}, failurePolicy={"maxRestarts": 4, "backoffSeconds": 10, "backoffCapSeconds": 25}))  # fmt: skip
    bench.run_until("Failed", seconds=200)
    times = [body["metadata"]["creationTimestamp"] for body in bench.store.objects["Event"].values()
             if body["reason"] == "StageStarted"]  # fmt: skip
    seconds = [int(text[14:16]) * 60 + int(text[17:19]) for text in times]
    gaps = [later - earlier for earlier, later in itertools.pairwise(seconds)]
    assert len(gaps) == 4
    assert all(low <= gap <= low + 2 for gap, low in zip(gaps, (10, 20, 25, 25)))


def test_suspend_saves_a_checkpoint_releases_everything_and_resumes_from_it(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 50, "step_seconds": 0.1}))
    bench.run(2.0)
    bench.edit(suspend=True)
    status = bench.run_until("Suspended")
    assert bench.jobs() == []
    assert not bench.store.objects["Pod"]
    assert condition(status, "Suspended")["status"] == "True"
    saved = status["lastCheckpoint"]["step"]
    assert saved > 0
    assert status["restarts"] == 0
    bench.run(20.0)
    assert bench.jobs() == []
    bench.edit(suspend=False)
    bench.run(1.0)
    assert bench.cluster.launches[-1][:2] == ("tiny-s0-2", saved)
    bench.edit(suspend=False)
    assert bench.run_until("Succeeded")["stages"][0]["attempt"] == 2


def test_suspend_on_an_old_view_does_not_undo_a_finished_stage(bench):
    """The stage ends, the watch misses it, and just then a person suspends: the stage stays done."""
    bench.store.create(tiny_curriculum())
    bench.run(0.3)
    while "tiny-s0-1" not in bench.store.objects["RayJob"] or (
        (bench.store.objects["RayJob"]["tiny-s0-1"].get("status") or {}).get("jobDeploymentStatus") != "Complete"
    ):
        bench.cluster.tick(bench.clock.forward)
        bench.clock.advance(0.05)
    bench.edit(suspend=True)
    bench.controller.cache.store("Curriculum", bench.store.objects["Curriculum"]["tiny"])
    bench.controller.handle("tiny")  # with the RayJob as it was before
    bench.run(1.0)
    bench.edit(suspend=False)
    status = bench.run_until("Succeeded")
    assert [stage["attempt"] for stage in status["stages"]] == [1, 1]


def test_suspend_of_a_queued_attempt_needs_no_checkpoint(bench):
    bench.cluster.quota = 0
    bench.store.create(tiny_curriculum(queue=QUEUE))
    bench.run(1.0)
    bench.edit(suspend=True)
    bench.run_until("Suspended", seconds=5)
    assert bench.jobs() == []


def test_paused_finishes_the_stage_and_starts_no_other(bench):
    bench.store.create(tiny_curriculum())
    bench.run(0.3)
    bench.edit(paused=True)
    status = bench.run_until("Paused")
    assert status["stagesDone"] == "1/2"
    assert condition(status, "Progressing")["reason"] == "Paused"
    bench.edit(paused=False)
    bench.run_until("Succeeded")


def test_waiting_for_quota_shows_the_words_of_the_queue(bench):
    bench.cluster.quota = 0
    bench.store.create(tiny_curriculum(queue=QUEUE))
    status = bench.run_until("Queued")
    assert "insufficient unused quota" in condition(status, "QuotaReserved")["message"]
    assert condition(status, "Progressing")["reason"] == "WaitingForQuota"
    bench.run(60.0)
    bench.clock.advance(86_400 * 3)  # waiting for days is not stalling
    bench.run(5.0)
    assert bench.status()["phase"] == "Queued"
    assert bench.status()["restarts"] == 0
    bench.cluster.quota = None
    bench.run_until("Succeeded")


def test_preemption_by_the_queue_counts_in_no_budget_and_returns_by_itself(bench):
    bench.store.create(tiny_curriculum(
        queue=QUEUE, behaviour={"steps": 30, "step_seconds": 0.1}, failurePolicy={"maxRestarts": 0, "maxInfraRestarts": 0}))  # fmt: skip
    bench.run(2.0)
    bench.cluster.quota = 0
    bench.cluster.preempt("tiny-s0-1")
    bench.run(2.0)
    status = bench.status()
    assert status["phase"] == "Queued", summary(status)
    assert condition(status, "Progressing")["reason"] == "Preempted"
    assert status["stages"][0]["preemptions"] == 1
    assert status["restarts"] == 0
    bench.cluster.quota = None
    status = bench.run_until("Succeeded")
    assert status["stages"][0]["attempt"] == 1  # the same RayJob came back, and continued from its checkpoint
    assert [step > 0 for name, step, _ in bench.cluster.launches if name == "tiny-s0-1"] == [False, True]


def test_rayjob_deleted_by_hand_is_an_infrastructure_failure(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 20}))
    bench.run(1.0)
    bench.store.delete("RayJob", "tiny-s0-1", foreground=True)
    status = bench.run_until("Succeeded")
    assert (status["stages"][0]["attempt"], status["stages"][0]["infraRestarts"]) == (2, 1)
    assert (
        "AttemptFailed",
        "stage warmup, attempt 1: AttemptLost: the attempt vanished without an outcome",
    ) in bench.events()


def test_dead_node_is_found_by_silence_and_the_old_attempt_is_fenced(bench):
    bench.store.create(tiny_curriculum(
        behaviour={"steps": 20}, failurePolicy={"stallTimeoutSeconds": 30, "fenceTimeoutSeconds": 60, "backoffSeconds": 0.2}))  # fmt: skip
    bench.run(1.0)
    bench.cluster.dead.add("tiny-s0-1")  # RUNNING for ever, pods Terminating for ever
    bench.run(25.0)
    assert bench.status()["stages"][0]["attempt"] == 1
    bench.run(10.0)
    assert "tiny-s0-1" in bench.jobs()
    assert "Stalled" in str(bench.events())
    assert bench.status()["stages"][0]["attempt"] == 1  # its pods are still there: nothing new yet
    bench.run(70.0)
    assert "tiny-s0-1" in bench.jobs()  # still terminating
    assert bench.status()["stages"][0]["attempt"] == 2  # but fenced
    assert bench.run_until("Succeeded")["stages"][0]["infraRestarts"] == 1


def test_gate_missed_pauses_and_a_resume_token_accepts_it(bench):
    gates = [{"metric": "eval/caption/loss", "below": 2.0}]
    behaviour = {"stages": {"warmup": {"after": {"caption": 2.5}}}}
    bench.store.create(tiny_curriculum(stages=[tiny_stage("warmup", gates=gates), tiny_stage("align")], behaviour=behaviour))
    status = bench.run_until("Paused")
    assert condition(status, "Progressing")["reason"] == "GateMissed"
    assert "eval/caption/loss" in condition(status, "Progressing")["message"]
    bench.run(10.0)
    assert bench.status()["phase"] == "Paused"
    bench.edit(resumeToken="accepted by hand")
    assert bench.run_until("Succeeded")["stages"][0]["attempt"] == 1


def test_cancel_ends_it_for_good(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 50, "step_seconds": 0.1}))
    bench.run(1.5)
    bench.edit(cancelled=True)
    status = bench.run_until("Failed")
    assert condition(status, "Failed")["reason"] == "Cancelled"
    assert bench.jobs() == []
    with pytest.raises(Exception, match="stays cancelled"):
        bench.edit(cancelled=False)


def test_rerun_from_a_stage_moves_the_old_aside_and_takes_new_attempt_numbers(bench):
    bench.store.create(tiny_curriculum(stages=five_stages()[:3]))
    bench.run_until("Succeeded")
    bench.edit(rerunFrom="align", resumeToken="rerun-1")
    bench.run(0.5)
    job = bench.store.objects["RayJob"]["tiny-s1-2"]
    assert "--rerun 1" in job["spec"]["entrypoint"]
    status = bench.run_until("Succeeded")
    assert [stage["attempt"] for stage in status["stages"]] == [1, 2, 2]
    bench.run(10.0)
    assert bench.status()["phase"] == "Succeeded"  # the token acts once


def test_reports_of_older_attempts_are_ignored(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 40, "step_seconds": 0.5, "attempts": {}}))
    bench.run(1.0)
    bench.store.delete("RayJob", "tiny-s0-1")
    bench.run(3.0)
    stage = bench.status()["stages"][0]
    assert stage["attempt"] == 2
    old = {
        "stage": "warmup",
        "attempt": 1,
        "step": 39,
        "total_steps": 40,
        "result": {"loss": 0.0},
        "exit": {"status": 0},
    }
    bench.store.patch("ConfigMap", "tiny-progress", {"data": {"progress.json": json.dumps(old)}})
    bench.controller.resync()
    bench.controller.handle("tiny")
    assert bench.status()["stages"][0]["step"] < 39
    assert bench.status()["stages"][0]["phase"] != "Succeeded"


def test_refused_creation_is_tried_again_with_backoff_and_shown(bench):
    denied = []

    def webhook(kind, body, old):
        if kind == "RayJob" and len(denied) < 2 and old is None:
            denied.append(body["metadata"]["name"])
            from terrace.cluster.api import Refused

            raise Refused("admission webhook denied the request: image not signed", 403)

    bench.store.admission.append(webhook)
    bench.store.create(tiny_curriculum())
    status = bench.run_until("Succeeded")
    assert denied == ["tiny-s0-1", "tiny-s0-2"]
    assert status["stages"][0]["infraRestarts"] == 2
    assert any("image not signed" in message for reason, message in bench.events() if reason == "AttemptFailed")


def test_name_taken_by_something_else_is_shown_and_not_used(bench):
    bench.store.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "tiny-trainer"}})
    bench.store.create(tiny_curriculum())
    bench.run(3.0)
    assert bench.jobs() == []
    assert any("its name is taken by something else" in message for _, message in bench.events())
    bench.store.delete("ServiceAccount", "tiny-trainer")
    bench.run_until("Succeeded")


def test_progress_channel_deleted_by_hand_is_made_anew(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 30, "step_seconds": 0.1}))
    bench.run(1.0)
    bench.store.delete("ConfigMap", "tiny-progress")
    assert bench.run_until("Succeeded")["restarts"] == 0


def test_program_that_never_starts_is_replaced(bench):
    bench.store.create(tiny_curriculum(failurePolicy={"preRunningTimeoutSeconds": 60, "backoffSeconds": 0.2}))
    bench.cluster.boot_seconds = 1000.0
    bench.run(60.0, step=0.5)
    bench.cluster.boot_seconds = 0.2
    status = bench.run_until("Succeeded")
    assert "PreRunningDeadlineExceeded" in str(bench.events())
    assert status["stages"][0]["infraRestarts"] == 1


def test_clock_that_jumps_makes_no_failures(bench):
    bench.store.create(tiny_curriculum(
        behaviour={"steps": 60, "step_seconds": 0.2, "stages": {"align": {"attempts": {"1": {"exit": 1}}}}}))  # fmt: skip
    for jump in (7200.0, -10_000.0, 86_400.0, -86_400.0):
        bench.run(2.0)
        bench.clock.now += jump
    status = bench.run_until("Succeeded", seconds=120)
    assert [(s["attempt"], s["infraRestarts"]) for s in status["stages"]] == [(1, 0), (2, 0)]


def test_a_slow_start_is_no_stall(bench):
    """Pulling an image may take longer than a program may be silent: silence counts from the program's start."""
    bench.store.create(tiny_curriculum(behaviour={"steps": 4, "step_seconds": 20},
                                       failurePolicy={"stallTimeoutSeconds": 30, "preRunningTimeoutSeconds": 600}))  # fmt: skip
    bench.cluster.boot_seconds = 200.0
    bench.run(210.0, step=0.5)
    bench.cluster.boot_seconds = 0.2
    status = bench.run_until("Succeeded", seconds=400)
    assert [(s["attempt"], s["infraRestarts"]) for s in status["stages"]] == [(1, 0), (1, 0)]


def test_a_clock_set_back_does_not_hide_a_stall_and_costs_no_reconciles(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 20, "stages": {"warmup": {"attempts": {"1": {"hang": True}}}}},
                                       failurePolicy={"stallTimeoutSeconds": 30, "backoffSeconds": 0.2}))  # fmt: skip
    bench.run(3.0)
    bench.clock.now -= 3600
    waits = []
    for _ in range(56):
        bench.run(0.5)
        waits.append(bench.controller.handle("tiny"))
    assert bench.status()["stages"][0]["attempt"] == 1
    assert min(waits[:40]) > 5, "it looks again when the silence would be too long, not all the time"
    bench.run(10.0)
    assert "Stalled" in str(bench.events())
    assert bench.run_until("Succeeded")["stages"][0]["infraRestarts"] == 1


def test_what_has_ended_costs_nothing_more(bench):
    bench.store.create(tiny_curriculum())
    bench.run_until("Succeeded")
    bench.run(2.0)
    assert bench.controller.handle("tiny") is None
    assert bench.controller.resync() == []
    bench.edit(resumeToken="again", rerunFrom="warmup")
    assert bench.controller.resync() == ["tiny"], "an edit is looked at even if its event was lost"


def test_deleted_curriculum_leaves_nothing(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 50}))
    bench.run(1.5)
    bench.store.delete("Curriculum", "tiny")
    bench.run(3.0)
    left = {kind: list(bodies) for kind, bodies in bench.store.objects.items() if bodies and kind != "Event"}
    assert left == {}


def test_status_is_stable_while_nothing_happens(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 3, "step_seconds": 1000}))
    bench.run(2.0)
    before = bench.store.calls["status Curriculum"]
    bench.run(30.0)
    assert bench.store.calls["status Curriculum"] == before
