"""What a person meets at the command line: wishes that cannot come true, logs that are not there, a status that can be read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from cluster_world import ROOT, condition, tiny_curriculum, tiny_stage
from fake.server import Server
from kustomize import kubectl

from terrace import cli
from terrace.cluster.kubernetes import Reference, request
from terrace.curriculum.state import RunState, StageState
from terrace.errors import InputError
from terrace_operator.codec import Memory, decode, encode

TINY = Reference("default", "tiny")


@pytest.fixture
def served(crd, monkeypatch, tmp_path):
    """A fake API server that the command line talks to."""
    with Server(crd) as server:
        file = tmp_path / "config.yaml"
        file.write_text(server.kubeconfig())
        monkeypatch.setenv("KUBECONFIG", str(file))
        yield server


@pytest.mark.parametrize(
    ("phase", "spec", "wish", "stage", "says"),
    [
        ("Failed", {"cancelled": True}, "resume", None, "cancelled, which is for good"),
        ("Failed", {"cancelled": True}, "resume", "align", "cancelled, which is for good"),
        ("Failed", {"cancelled": True}, "suspend", None, "nothing to suspend"),
        ("Succeeded", {}, "resume", None, "--from STAGE runs stages again"),
        ("Succeeded", {}, "pause", None, "nothing to pause"),
        ("Failed", {}, "cancel", None, "nothing to cancel"),
        ("Running", {}, "resume", None, "waits for nobody"),
        ("Running", {}, "resume", "nowhere", "there is no stage nowhere; its stages are warmup, align"),
    ],
)
def test_a_wish_that_cannot_come_true_is_refused(bench, phase, spec, wish, stage, says):
    bench.store.create(tiny_curriculum(**spec))
    bench.store.replace_status({**bench.store.objects["Curriculum"]["tiny"], "status": {"phase": phase}})
    with pytest.raises(InputError, match=re.escape(says)):
        request(TINY, wish, stage, api=bench.store)


@pytest.mark.parametrize(
    ("phase", "spec", "wish", "stage"),
    [("Failed", {}, "resume", None), ("Paused", {}, "resume", None), ("Suspended", {"suspend": True}, "resume", None),
     ("Running", {"paused": True}, "resume", None), ("Succeeded", {}, "resume", "align"), ("Running", {}, "cancel", None)],
)  # fmt: skip
def test_a_wish_that_can_is_passed_on(bench, phase, spec, wish, stage):
    bench.store.create(tiny_curriculum(**spec))
    bench.store.replace_status({**bench.store.objects["Curriculum"]["tiny"], "status": {"phase": phase}})
    before = bench.store.objects["Curriculum"]["tiny"]["metadata"]["generation"]
    request(TINY, wish, stage, api=bench.store)
    assert bench.store.objects["Curriculum"]["tiny"]["metadata"]["generation"] == before + 1


def test_logs_of_pods_and_where_to_look_without_them(served, capsys):
    served.store.create(tiny_curriculum())
    assert cli.main(["logs", "k8s://default/tiny"]) == 2
    assert "no pod is left to read from" in (text := capsys.readouterr().err)
    assert "s3://bucket/runs/tiny/stages/*/attempts/" in text
    assert cli.main(["logs", "k8s://default/tiny", "--stage", "nowhere"]) == 2
    assert "there is no stage nowhere" in capsys.readouterr().err
    assert cli.main(["logs", "k8s://default/tiny", "--rank", "3"]) == 2
    assert "--rank 3" in capsys.readouterr().err
    for index in (0, 1):
        served.store.create({"apiVersion": "v1", "kind": "Pod", "spec": {}, "metadata": {
            "name": f"tiny-s{index}-1-x", "annotations": {"log": f"line of stage {index}\n", "rayjob": f"tiny-s{index}-1"}, "labels": {
                "terrace.dev/curriculum": "tiny", "terrace.dev/stage-index": str(index),
                "app.kubernetes.io/component": "submitter"}}})  # fmt: skip
    assert cli.main(["logs", "k8s://default/tiny"]) == 0
    assert capsys.readouterr().out == "line of stage 0\nline of stage 1\n"
    assert cli.main(["logs", "k8s://default/tiny", "--stage", "align"]) == 0
    assert capsys.readouterr().out == "line of stage 1\n"


def test_the_command_line_says_what_is_missing(served, capsys):
    assert cli.main(["status", "k8s://default/none"]) == 2
    assert "there is no such Curriculum" in capsys.readouterr().err
    served.store.absent.add("Curriculum")
    assert cli.main(["status", "k8s://default/tiny"]) == 2
    assert "kubectl apply -k k8s/ installs it" in capsys.readouterr().err


def test_a_run_on_kubernetes_draws_nothing_here(monkeypatch, tmp_path):
    import argparse

    drawn = []
    monkeypatch.setattr("terrace.demo.corpus.draw_missing", lambda *values: drawn.append(values))
    parsed = argparse.Namespace(recipe=ROOT / "jobs/recipes/demo.yaml", overrides=[], launcher="kubernetes")
    cli._draw_demo_scenes(parsed)
    assert drawn == []
    parsed.launcher = "local"
    cli._draw_demo_scenes(parsed)
    assert len(drawn) == 1


def test_suspend_while_paused_is_a_suspension_and_the_pause_is_there_afterwards(bench):
    bench.store.create(tiny_curriculum(paused=True))
    bench.run_until("Paused")
    bench.edit(suspend=True)
    status = bench.run_until("Suspended", seconds=5)
    assert condition(status, "Suspended")["status"] == "True"
    bench.edit(suspend=False)
    bench.run_until("Paused", seconds=5)
    bench.edit(paused=False)
    bench.run_until("Succeeded")


@pytest.mark.parametrize(("wish", "phase"), [("suspend", "Suspended"), ("paused", "Paused"), ("cancelled", "Failed")])
def test_made_suspended_paused_or_cancelled_it_starts_nothing(bench, wish, phase):
    bench.store.create(tiny_curriculum(**{wish: True}))
    bench.run_until(phase, seconds=5)
    bench.run(5.0)
    assert bench.store.calls.get("create RayJob", 0) == 0
    if wish != "cancelled":
        bench.edit(**{wish: False})
        bench.run_until("Succeeded")


def test_suspend_at_a_missed_gate_does_not_answer_it(bench):
    gates = [{"metric": "eval/caption/loss", "below": 2.0}]
    behaviour = {"stages": {"warmup": {"after": {"caption": 2.5}}}}
    bench.store.create(tiny_curriculum(stages=[tiny_stage("warmup", gates=gates), tiny_stage("align")], behaviour=behaviour))
    bench.run_until("Paused")
    bench.edit(suspend=True)
    bench.run(2.0)
    assert bench.status()["phase"] == "Paused"
    assert condition(bench.status(), "Suspended")["status"] == "True"
    bench.edit(suspend=False)
    bench.run(2.0)
    assert condition(bench.status(), "Progressing")["reason"] == "GateMissed"
    assert condition(bench.status(), "Suspended")["status"] == "False"


def test_no_seconds_since_the_epoch_in_a_status(bench):
    bench.store.create(tiny_curriculum(behaviour={"stages": {"align": {"attempts": {"1": {"exit": 1}}}}}))
    bench.run_until("Succeeded")
    assert re.findall(r"1[5-9]\d{8}", json.dumps(bench.status())) == []


def test_times_are_read_back_as_they_were_and_from_older_operators():
    stage = StageState("a", 0, attempt=2, attempt_started_at=1_795_890_700.5, retry_at=1_795_890_800.25)
    state = RunState([stage], started_at=1_795_890_600.0)
    memory = Memory(admitted_at={"x-s0-2": 1_795_890_700.5})
    stored = json.loads(json.dumps(encode(state, memory)))
    assert stored["machine"]["stages"][0]["attempt_started_at"] == "2026-11-28T18:31:40.500Z"
    assert decode(stored, ["a"]) == (state, memory)
    stored["machine"]["started_at"], stored["operator"]["admitted_at"] = 1_795_890_600.0, {"x-s0-2": 1_795_890_700.5}
    assert decode(stored, ["a"]) == (state, memory)


def test_kubectl_plugin(served, tmp_path):
    """`kubectl terrace WORD NAME`, with a real kubectl against the fake API server."""
    if kubectl() is None:
        pytest.skip("kubectl is not installed")
    served.store.create(tiny_curriculum())
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "kubectl-terrace").symlink_to(ROOT / "k8s/kubectl-terrace")
    (folder / "terrace").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m terrace.cli "$@"\n')
    (folder / "terrace").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}/platform"}

    def run(*words):
        done = subprocess.run(["kubectl", "terrace", *words], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    assert run("status", "tiny") == (0, "k8s://default/tiny  Pending  stages 0\n")
    assert run("suspend", "tiny")[0] == 0
    assert served.store.objects["Curriculum"]["tiny"]["spec"]["suspend"] is True
    code, text = run("status", "tiny", "-n", "elsewhere")
    assert (code, "k8s://elsewhere/tiny" in text) == (2, True)
    assert run("status")[0] == 2
