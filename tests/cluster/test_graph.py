"""Branches of a recipe with `stage_order: graph` under the operator: side by side where the queue has room, with the same guarantees."""

from __future__ import annotations

import json

import pytest
from cluster_world import Bench, condition, tiny_curriculum, tiny_stage

from terrace.cluster.api import Refused
from terrace_operator.recipes import check


def graph(behaviour: dict | None = None, **spec) -> dict:
    """base; reward and sft start from it; rl starts from sft and waits for reward."""
    stages = [tiny_stage("base"), tiny_stage("reward", start_from="base"), tiny_stage("sft", start_from="base"),
              tiny_stage("rl", start_from="sft", after=["reward"])]  # fmt: skip
    behaviour = {"steps": 10, "step_seconds": 0.5} | (behaviour or {})
    return tiny_curriculum(stages=stages, behaviour=behaviour, stage_order="graph", **spec)


def until(bench: Bench, test, seconds: float = 120.0) -> dict:
    for _ in range(round(seconds / 0.1)):
        bench.run(0.1)
        if bench.status() and test(bench.status()):
            return bench.status()
    raise AssertionError(json.dumps(bench.status().get("stages"))[:2000])


def phases(status: dict) -> list[str]:
    return [stage["phase"] for stage in status["stages"]]


def attempts(status: dict) -> list[tuple[int, int, int]]:
    return [(stage["attempt"], stage["restarts"], stage["infraRestarts"]) for stage in status["stages"]]


def both_run(status: dict) -> bool:
    return phases(status)[1:3] == ["Running", "Running"]


def test_branches_run_side_by_side_each_with_its_own_report(bench):
    gpus = {"resources": {"workers": 1, "gpus_per_worker": 2}}
    body = graph()
    for stage in body["spec"]["recipe"]["stages"]:
        stage |= gpus
    bench.store.create(body)
    status = until(bench, both_run)
    assert bench.jobs() == ["tiny-s0-1", "tiny-s1-1", "tiny-s2-1"]  # the first is complete
    assert (status["currentStage"], status["allocatedGpus"], status["stagesDone"]) == ("reward,sft", 4, "1/4")
    status = until(bench, lambda status: all(stage["step"] >= 3 for stage in status["stages"][1:3]))
    data = bench.store.objects["ConfigMap"]["tiny-progress"]["data"]
    assert {key for key in data if key.endswith("progress.json")} == {f"s{index}.progress.json" for index in range(3)}
    status = bench.run_until("Succeeded", seconds=120)
    assert attempts(status) == [(1, 0, 0)] * 4
    assert [name for name, *_ in bench.cluster.launches] == ["tiny-s0-1", "tiny-s1-1", "tiny-s2-1", "tiny-s3-1"]


def test_the_queue_decides_how_many_run(bench):
    bench.cluster.quota = 1
    bench.store.create(graph(queue={"name": "training"}))
    status = until(bench, lambda status: sorted(phases(status)[1:3]) == ["Queued", "Running"])
    assert status["phase"] == "Running"  # the branch that has its quota speaks for the Curriculum
    assert condition(status, "Progressing")["reason"] == "Running"
    assert attempts(bench.run_until("Succeeded", seconds=240)) == [(1, 0, 0)] * 4


def test_a_branch_that_is_preempted_or_fails_leaves_the_other_alone(bench):
    behaviour = {"stages": {"sft": {"attempts": {"1": {"exit": 1}}}}}
    bench.store.create(graph(behaviour, queue={"name": "training"}))
    until(bench, both_run)
    bench.cluster.preempt("tiny-s1-1")
    status = bench.run_until("Succeeded", seconds=240)
    assert attempts(status) == [(1, 0, 0), (1, 0, 0), (2, 1, 0), (1, 0, 0)]
    assert [stage["preemptions"] for stage in status["stages"]] == [0, 1, 0, 0]


def test_silence_of_one_branch_is_not_hidden_by_the_other(bench):
    behaviour = {"stages": {"reward": {"attempts": {"1": {"hang": True}}}, "sft": {"steps": 200}}}
    bench.store.create(graph(behaviour, failurePolicy={"stallTimeoutSeconds": 30, "backoffSeconds": 0.2}))
    until(bench, both_run)
    until(bench, lambda status: condition(status, "Degraded")["reason"] == "Stalled", 60)
    status = until(bench, lambda status: status["stages"][1]["attempt"] == 2, 60)
    assert (status["stages"][1]["infraRestarts"], status["stages"][2]["attempt"]) == (1, 1)


def test_a_branch_that_fails_for_good_stops_the_other_with_a_checkpoint_and_both_can_go_on(bench):
    behaviour = {"stages": {"reward": {"attempts": {"1": {"exit": 1, "message": "loss became NaN"}}}, "sft": {"steps": 200}}}
    bench.store.create(graph(behaviour, failurePolicy={"maxRestarts": 0}))
    until(bench, both_run)
    status = bench.run_until("Failed")
    assert "loss became NaN" in condition(status, "Failed")["message"]
    saved = status["stages"][2]["checkpoint"]["step"]
    assert (status["stages"][2]["phase"], bench.jobs()) == ("Stopped", ["tiny-s0-1"])
    bench.edit(resumeToken="again")
    until(bench, both_run)
    assert [start for name, start, _ in bench.cluster.launches if name == "tiny-s2-2"] == [saved]


def test_suspend_tells_both_and_releases_both(bench):
    bench.store.create(graph({"stages": {"sft": {"steps": 200}, "reward": {"steps": 200}}}))
    until(bench, lambda status: both_run(status) and all(stage["step"] >= 2 for stage in status["stages"][1:3]))
    bench.edit(suspend=True)
    status = bench.run_until("Suspended")
    assert bench.jobs() == ["tiny-s0-1"]
    assert phases(status)[1:3] == ["Stopped", "Stopped"]
    assert [stage["checkpoint"]["step"] >= 2 for stage in status["stages"][:3]] == [True] * 3
    bench.edit(suspend=False)
    status = until(bench, both_run)
    assert attempts(status)[1:3] == [(2, 0, 0), (2, 0, 0)]


def test_the_operator_may_die_at_any_time(crd):
    for every in (0.3, 1.1, 2.3):
        bench = Bench(crd)
        bench.store.create(graph({"stages": {"reward": {"attempts": {"1": {"exit": 1}}}}}, queue={"name": "training"}))
        for _ in range(400):
            bench.run(every)
            bench.restart()
            if bench.status().get("phase") == "Succeeded":
                break
        assert attempts(bench.status()) == [(1, 0, 0), (2, 1, 0), (1, 0, 0), (1, 0, 0)]


def test_a_rerun_takes_what_waits_for_the_stage_and_nothing_else(bench):
    bench.store.create(graph())
    bench.run_until("Succeeded", seconds=120)
    bench.edit(rerunFrom="reward", resumeToken="once")
    until(bench, lambda status: status["phase"] != "Succeeded", 5)
    assert [attempt for attempt, *_ in attempts(bench.run_until("Succeeded", seconds=120))] == [1, 2, 1, 2]


def test_what_the_graph_may_be(bench):
    assert "does not stand before" in check(_wait_for_a_later_one()["spec"])[1]
    made = bench.store.create(graph())
    with pytest.raises(Refused, match="stage_order cannot change"):
        bench.store.patch("Curriculum", made["metadata"]["name"], {"spec": {"recipe": {"stage_order": "sequence"}}})


def _wait_for_a_later_one() -> dict:
    body = graph()
    body["spec"]["recipe"]["stages"][1]["after"] = ["rl"]
    return body
