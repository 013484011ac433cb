"""The Kubernetes launcher: apply, follow, wishes, references."""

from __future__ import annotations

import pytest
from cluster_world import tiny_curriculum

from terrace.cluster import kubernetes
from terrace.cluster.kubernetes import Reference, apply, describe, follow, parse_reference, request
from terrace.errors import InputError


def test_reference_is_told_from_a_directory():
    assert parse_reference("k8s://terrace/tiny") == Reference("terrace", "tiny")
    assert parse_reference("k8s:/terrace/tiny") == Reference("terrace", "tiny")  # as pathlib writes it
    assert parse_reference("runs/demo") is None


def test_apply_follow_and_wishes(bench, monkeypatch):
    reference = Reference("default", "tiny")
    apply(bench.store, tiny_curriculum(behaviour={"steps": 30, "step_seconds": 0.1}))
    shown: list[str] = []
    monkeypatch.setattr(kubernetes.time, "sleep", lambda seconds: bench.run(0.5))
    bench.run(1.5)
    request(reference, "suspend", api=bench.store)
    assert follow(reference, shown.append, bench.store) == 143
    apply(bench.store, tiny_curriculum(behaviour={"steps": 30, "step_seconds": 0.1}))  # the same file again
    assert bench.store.objects["Curriculum"]["tiny"]["spec"]["suspend"] is True  # keeps the wish
    request(reference, "resume", api=bench.store)
    assert follow(reference, shown.append, bench.store) == 0
    assert any("Suspended" in line for line in shown)
    assert "Succeeded" in shown[-1]
    request(reference, "resume", "align", api=bench.store)
    bench.run(1.0)
    assert bench.status()["stages"][1]["attempt"] == 2
    request(reference, "cancel", api=bench.store)
    assert follow(reference, shown.append, bench.store) == 1


def test_wrong_input_is_exit_status_2(bench, monkeypatch):
    monkeypatch.setattr(kubernetes.time, "sleep", lambda seconds: bench.run(0.5))
    apply(bench.store, tiny_curriculum(behaviour={"exit": 2}))
    assert follow(Reference("default", "tiny"), print, bench.store) == 2


def test_refusals_are_input_errors(bench):
    wrong = tiny_curriculum()
    wrong["spec"]["recipe"]["stages"] = []
    with pytest.raises(InputError, match="refused Curriculum tiny"):
        apply(bench.store, wrong)
    with pytest.raises(InputError, match="no such Curriculum"):
        request(Reference("default", "none"), "pause", api=bench.store)


def test_describe_says_why_it_waits(bench):
    bench.cluster.quota = 0
    bench.store.create(tiny_curriculum(queue={"name": "training"}))
    bench.run(2.0)
    assert "insufficient unused quota" in describe(bench.status())
