"""The channel between a running attempt and the operator: fencing, directives, what is reported."""

from __future__ import annotations

import json

import pytest
from fake.store import Store

from terrace.cluster.api import ApiError
from terrace.cluster.attempt_files import Fenced
from terrace.cluster.progress_channel import Follower, ProgressChannel, channel_from_environment, read_progress


@pytest.fixture
def store():
    store = Store()
    store.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "tiny-progress"}, "data": {}})
    return store


def channel(store, attempt=1, cluster="a", stage="warmup"):
    return ProgressChannel(store, "tiny-progress", stage, attempt, cluster)


def data(store, key):
    return json.loads(store.objects["ConfigMap"]["tiny-progress"]["data"].get(key, "{}"))


def test_report_is_written_once_and_a_directive_is_read(store):
    one = channel(store)
    one.claim()
    assert one.report({"step": 1}) is None
    version = store.version
    assert one.report({"step": 1}) is None
    assert store.version == version  # nothing new, nothing written: silence must show
    store.patch(
        "ConfigMap", "tiny-progress", {"data": {"directive.json": json.dumps({"stage": "warmup", "attempt": 1, "stop": "suspend"})}}
    )
    assert one.report({"step": 2}) == "suspend"
    assert data(store, "progress.json")["step"] == 2


def test_directive_of_an_older_attempt_is_not_obeyed(store):
    store.patch(
        "ConfigMap", "tiny-progress", {"data": {"directive.json": json.dumps({"stage": "warmup", "attempt": 1, "stop": "suspend"})}}
    )
    two = channel(store, attempt=2)
    two.claim()
    assert two.report({"step": 1}) is None


def test_older_attempt_and_older_start_of_the_same_attempt_are_fenced(store):
    old, again, new = channel(store, 1, "a"), channel(store, 1, "b"), channel(store, 2, "c")
    old.claim()
    again.claim()  # the same attempt came back after a preemption, in another RayCluster
    with pytest.raises(Fenced):
        old.report({"step": 5})
    again.report({"step": 6})
    new.claim()
    with pytest.raises(Fenced):
        again.report({"step": 7})
    with pytest.raises(Fenced, match="overtaken by attempt 2"):
        channel(store, 1, "d").claim()
    assert data(store, "progress.json")["step"] == 6


def test_channel_that_was_made_anew_is_taken_again(store):
    one = channel(store)
    one.claim()
    store.patch("ConfigMap", "tiny-progress", {"data": {"holder.json": None}})
    one.report({"step": 3})
    assert data(store, "holder.json")["attempt"] == 1
    assert data(store, "progress.json")["step"] == 3


def test_two_writers_cannot_interleave(store):
    """Somebody writes between the read and the write: the report is decided again, not lost and not forced."""
    one = channel(store)
    one.claim()
    real = store.patch
    rivals = [channel(store, 2, "c")]

    def patch(kind, name, change, subresource=""):
        if rivals and "progress.json" in change.get("data", {}):
            rivals.pop().claim()
        return real(kind, name, change, subresource)

    store.patch = patch
    with pytest.raises(Fenced):
        one.report({"step": 5})
    assert "progress.json" not in store.objects["ConfigMap"]["tiny-progress"]["data"]


def test_progress_is_read_from_what_the_trainer_writes(tmp_path):
    assert read_progress(str(tmp_path)) == {"step": 0, "total_steps": 0}
    (tmp_path / "plan.json").write_text('{"total_steps": 9}')
    lines = [json.dumps({"step": step, "loss": 2.0 / step, "learning_rate": {"vision": 1e-4}}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')  # the last line is being written
    for step, whole in ((2, True), (3, False)):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "manifest.json").write_text("{}")
    found = read_progress(str(tmp_path))
    assert (found["step"], found["total_steps"], found["metrics"]) == (3, 9, {"loss": "0.666667"})
    assert found["checkpoint"]["step"] == 2  # a folder without a manifest is no checkpoint
    (tmp_path / "result.json").write_text(json.dumps({"steps": 9, "loss": 0.5, "per_source": {"a": 1}}))
    assert read_progress(str(tmp_path))["result"] == {"steps": 9, "loss": 0.5}


def test_follower_reports_stops_and_says_how_it_ended(store, tmp_path):
    stops, fenced = [], []
    follower = Follower(channel(store), str(tmp_path), stops.append, fenced.append, seconds=0.01)
    follower.start()
    store.patch(
        "ConfigMap", "tiny-progress", {"data": {"directive.json": json.dumps({"stage": "warmup", "attempt": 1, "stop": "suspend"})}}
    )
    for _ in range(500):
        if stops:
            break
        import time

        time.sleep(0.01)
    assert stops[0] == "suspend"
    (tmp_path / "result.json").write_text('{"loss": 0.1}')
    follower.finish(143, "stopped after a checkpoint")
    report = data(store, "progress.json")
    assert report["exit"] == {"status": 143, "message": "stopped after a checkpoint"}
    assert "result" not in report  # a stage that was stopped has no result
    assert fenced == []


def test_no_channel_outside_of_a_curriculum(monkeypatch):
    monkeypatch.delenv("TERRACE_PROGRESS", raising=False)
    assert channel_from_environment("warmup", 1) is None


def test_channel_that_is_gone_is_an_error(store):
    store.delete("ConfigMap", "tiny-progress")
    with pytest.raises(ApiError, match="gone"):
        channel(store).claim()


def test_a_restart_of_an_attempt_that_had_finished_does_not_hide_its_result(store):
    first = channel(store)
    first.claim()
    first.report({"step": 9, "result": {"loss": 0.5}, "exit": {"status": 0, "message": ""}})
    again = channel(store, cluster="another")  # its quota was taken and given back before the operator had looked
    again.claim()
    assert "nothing left to do" in again.report({"step": 0})
    assert data(store, "progress.json")["result"] == {"loss": 0.5}
    newer = channel(store, attempt=2)  # a rerun has a number of its own
    newer.claim()
    assert newer.report({"step": 0}) is None
    assert "result" not in data(store, "progress.json")
