"""`spec.limits`: what is used is counted, and at a limit the curriculum is suspended with a checkpoint and says why."""

from __future__ import annotations

import pytest
from cluster_world import condition, tiny_curriculum, tiny_stage

from terrace.cluster.api import Refused


def long_one(**limits):
    stages = [tiny_stage("warmup", resources={"workers": 4, "gpus_per_worker": 1})]
    return tiny_curriculum(stages=stages, behaviour={"steps": 60, "step_seconds": 60}, limits=limits)


def hours(bench, name="gpuHours"):
    return float(bench.status()["usage"][name])


@pytest.mark.parametrize(("limits", "after_minutes"), [
    ({"gpuHours": 1}, 15), ({"wallHours": 0.5}, 30), ({"cost": 8, "pricePerGpuHour": 4}, 30)])  # fmt: skip
def test_at_a_limit_it_is_suspended_with_a_checkpoint_and_a_higher_limit_continues_it(bench, limits, after_minutes):
    bench.store.create(long_one(**limits))
    bench.run((after_minutes - 2) * 60, step=10)
    assert bench.status()["phase"] == "Running"
    assert [reason for reason, _ in bench.events()].count("LimitNear") == 1
    bench.run(4 * 60, step=10)
    status = bench.status()
    assert status["phase"] == "Suspended"
    progressing = condition(status, "Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", "LimitReached")
    assert f"limits.{next(iter(limits))}" in progressing["message"]
    assert [reason for reason, _ in bench.events()].count("LimitReached") == 1
    assert status["lastCheckpoint"]["step"] >= after_minutes - 3
    assert bench.jobs() == []
    assert status["restarts"] == 0
    bench.run(3600, step=60)
    assert bench.status()["phase"] == "Suspended"
    bench.edit(limits={key: value if key == "pricePerGpuHour" else value * 100 for key, value in limits.items()})
    bench.run(30, step=1)
    assert bench.cluster.launches[-1][:2] == ("tiny-s0-2", status["lastCheckpoint"]["step"])


def test_gpu_hours_are_those_of_held_quota_and_not_of_waiting(bench):
    bench.cluster.quota = 0
    body = long_one(gpuHours=1000)
    body["spec"]["queue"] = {"name": "training"}
    bench.store.create(body)
    bench.run(3600, step=20)
    assert hours(bench) == 0.0
    assert hours(bench, "wallHours") >= 0.8
    bench.cluster.quota = None
    bench.run(1800, step=10)
    bench.edit(suspend=True)
    bench.run(1800, step=10)
    assert bench.status()["phase"] == "Suspended"
    assert 1.9 <= hours(bench) <= 2.2  # four GPUs for half an hour, and the end of it
    bench.restart()  # it is in the status, not in the operator's memory
    bench.run(60, step=10)
    assert 1.9 <= hours(bench) <= 2.2


def test_counting_writes_the_status_every_ten_minutes_at_most(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 3, "step_seconds": 100_000}, limits={"wallHours": 100}))
    bench.run(20)
    before = bench.store.calls["status Curriculum"]
    bench.run(1500, step=5)
    assert bench.store.calls["status Curriculum"] - before <= 3


def test_limits_that_mean_nothing_are_refused(bench):
    with pytest.raises(Refused, match="needs gpuHours, wallHours or cost"):
        bench.store.create(long_one())
    with pytest.raises(Refused, match="needs pricePerGpuHour"):
        bench.store.create(long_one(cost=5))
    with pytest.raises(Refused, match="gpuHours: Invalid value"):
        bench.store.create(long_one(gpuHours=0))
