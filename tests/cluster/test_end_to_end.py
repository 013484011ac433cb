"""The operator as a process, under its ServiceAccount's token, against an API server: the fake one by default, or a real cluster.

    pytest tests/cluster/test_end_to_end.py         # the fake API server, a simulated KubeRay and Kueue
    KUBECONFIG=... make test-cluster                # needs KubeRay's and Kueue's kinds; makes a namespace and a queue of its own

On a control plane without nodes nobody runs a pod: KubeRay, Kueue and the kubelet are then played on it (see `played.py`).
On a real cluster TERRACE_TEST_IMAGE names an image with Python and Ray (default rayproject/ray), TERRACE_TEST_RAY_VERSION its version,
and TERRACE_TEST_KILL_NODE a command that takes down the node it is given (without it the test of a dead node is skipped).
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter

import pytest
from cluster_world import ROOT, condition, tiny_curriculum, tiny_stage
from fake.podsecurity import enforce
from fake.server import Server
from harness import FakeHarness, RealHarness, is_gone
from played import PlayedHarness, has_no_nodes
from test_wrong_specs import RIGHT, WRONG

from terrace.cluster.api import Refused
from terrace_operator.recipes import check

FIVE = [tiny_stage(name) for name in ("warmup", "align", "pretrain", "long-sft", "rl")]


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.cluster)])
def cluster(request, crd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("operator")
    if request.param == "real":
        asked = "cluster" in (request.config.getoption("markexpr") or "").replace("not cluster", "")
        if not (asked and os.environ.get("KUBECONFIG")):
            pytest.skip("a real cluster is used only with KUBECONFIG and `-m cluster`")
        harness = PlayedHarness(folder) if has_no_nodes(os.environ["KUBECONFIG"]) else RealHarness(folder)
        harness.start()
        harness.silent = silent_one(harness)
        yield harness
        harness.stop()
        harness.remove()
        return
    with Server(crd, namespace="terrace") as server:
        server.store.admission.append(enforce)  # the namespace is under PodSecurity `restricted`
        harness = FakeHarness(server, folder)
        harness.start()
        harness.silent = silent_one(harness)
        yield harness
        harness.stop()


def silent_one(harness):
    """A curriculum whose first attempt falls silent; it is made first, so that its half minute passes while other tests run."""
    behaviour = {"steps": 6, "stages": {"warmup": {"attempts": {"1": {"hang": True}}}}}
    policy = {"stallTimeoutSeconds": harness.stall_seconds, "backoffSeconds": 0.2}
    return harness.create("silent", behaviour=behaviour, failurePolicy=policy)


def test_five_stages_to_succeeded_and_kubectl_shows_it(cluster):
    name = cluster.create("five", stages=FIVE)
    status = cluster.until(name, "Succeeded")
    assert status["stagesDone"] == "5/5"
    assert [stage["attempt"] for stage in status["stages"]] == [1] * 5
    cluster.kubectl("wait", "--for=condition=Succeeded", f"cur/{name}", "--timeout=10s")
    head, row = cluster.kubectl("get", "cur", name).splitlines()
    assert head.split() == ["NAME", "PHASE", "STAGE", "STAGES", "STEP", "RESTARTS", "REASON", "AGE"]
    assert row.split()[:2] == [name, "Succeeded"]
    reasons = {event["reason"] for event in cluster.api.list("Event") if event["involvedObject"]["name"] == name}
    assert {"Started", "StageStarted", "StageCompleted", "Succeeded"} <= reasons


def test_program_failure_until_the_budget_is_spent(cluster):
    behaviour = {"stages": {"align": {"exit": 1, "message": "loss became NaN at step 3"}}}
    name = cluster.create("broken", behaviour=behaviour, failurePolicy={"maxRestarts": 2, "backoffSeconds": 0.2})
    status = cluster.until(name, "Failed")
    assert status["stages"][1]["restarts"] == 3
    failed = condition(status, "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "ProgramFailuresSpent")
    assert "program failure 3; max_restarts is 2" in failed["message"]
    jobs = cluster.children(name).get("RayJob", [])
    for job in jobs:  # a terminal curriculum does not start again when its children vanish
        cluster.api.delete("RayJob", job)
    time.sleep(1.5)
    assert cluster.children(name).get("RayJob", []) == []


def test_suspend_and_resume_from_the_checkpoint(cluster):
    name = cluster.create("suspended", behaviour={"steps": 40, "step_seconds": 0.05})
    cluster.until(name, lambda status: status["stages"][0]["step"] >= 3, "at step 3")
    cluster.edit(name, suspend=True)
    status = cluster.until(name, "Suspended")
    saved = status["lastCheckpoint"]["step"]
    assert saved >= 3
    assert "RayJob" not in cluster.children(name)
    assert "Pod" not in cluster.children(name)
    cluster.edit(name, suspend=False)
    status = cluster.until(name, lambda status: status["stages"][0]["attempt"] == 2 and status["stages"][0]["step"] > saved, "resumed")
    assert status["restarts"] == 0
    cluster.until(name, "Succeeded")


def test_preemption_by_the_queue_and_return(cluster):
    name = cluster.create("preempted", behaviour={"steps": 40}, queue=cluster.queue,
                          failurePolicy={"maxRestarts": 0, "maxInfraRestarts": 0})  # fmt: skip
    cluster.until(name, lambda status: status["stages"][0]["step"] >= 3, "at step 3")
    cluster.hold_queue()
    try:
        # The RayJob and its Workload are watched apart: that it is suspended may be seen before why.
        waits = lambda s: s["phase"] == "Queued" and condition(s, "QuotaReserved")["status"] == "False"  # noqa: E731
        status = cluster.until(name, waits, "queued again")
        assert condition(status, "Progressing")["reason"] == "Preempted"
        assert condition(status, "QuotaReserved")["message"]
        time.sleep(0.5)
    finally:
        cluster.open_queue()
    status = cluster.until(name, "Succeeded")
    assert status["stages"][0]["preemptions"] == 1
    assert (status["restarts"], status["stages"][0]["attempt"]) == (0, 1)


def test_rayjob_deleted_by_hand_is_replaced(cluster):
    name = cluster.create("deleted", behaviour={"steps": 20})
    cluster.until(name, lambda status: status["stages"][0]["step"] >= 3, "at step 3")
    cluster.api.delete("RayJob", f"{name}-s0-1", foreground=True)
    status = cluster.until(name, "Succeeded")
    assert (status["stages"][0]["attempt"], status["stages"][0]["infraRestarts"]) == (2, 1)


def test_silence_is_found_and_a_new_attempt_continues(cluster):
    name = cluster.silent
    status = cluster.until(name, lambda s: s["stages"][0]["attempt"] == 2, "at a second attempt", 60.0)
    status = cluster.until(name, "Succeeded")
    assert status["stages"][0]["infraRestarts"] == 1
    messages = [event["message"] for event in cluster.api.list("Event") if event["involvedObject"]["name"] == name]
    assert any("Stalled: no progress for" in message for message in messages)


def test_wrong_specs_are_refused_by_the_server_or_never_started(cluster):
    """All of test_wrong_specs.py against this cluster's own API server, and what passes it against the operator's checks."""
    passed = []
    for what, (change, _, _) in WRONG.items():
        body = tiny_curriculum("wrong")
        change(body)
        try:
            cluster.dry_run(body)
        except Refused:
            continue
        if check(body["spec"])[1] == "":
            passed.append(what)
    assert passed == []
    for change in RIGHT.values():
        body = tiny_curriculum("right")
        change(body)
        cluster.dry_run(body)


def test_a_higher_priority_takes_the_quota_and_gives_it_back(cluster):
    cluster.narrow_queue()
    try:
        low = cluster.create("low", behaviour={"steps": 40}, queue={**cluster.queue, "priorityClass": f"{cluster.namespace}-low"})
        cluster.until(low, lambda status: status["stages"][0]["step"] >= 3, "at step 3")
        high = cluster.create("high", queue={**cluster.queue, "priorityClass": f"{cluster.namespace}-high"})
        cluster.until(low, lambda status: condition(status, "Progressing")["reason"] == "Preempted", "preempted")
        cluster.until(high, "Succeeded")
        status = cluster.until(low, "Succeeded")
        assert sum(stage["preemptions"] for stage in status["stages"]) >= 1  # in its second stage, where the first was quick
        assert (status["restarts"], [stage["attempt"] for stage in status["stages"]]) == (0, [1, 1])
    finally:
        cluster.open_queue()


def test_branches_of_a_graph_run_side_by_side(cluster):
    stages = [tiny_stage("base"), tiny_stage("reward", start_from="base"), tiny_stage("sft", start_from="base"),
              tiny_stage("rl", start_from="sft", after=["reward"])]  # fmt: skip
    behaviour = {"stages": {"sft": {"steps": 20}, "reward": {"steps": 20}}}
    name = cluster.create("graph", stages=stages, stage_order="graph", behaviour=behaviour)
    status = cluster.until(name, lambda s: [stage["phase"] for stage in s["stages"][1:3]] == ["Running", "Running"], "side by side")
    assert status["currentStage"] == "reward,sft"
    assert {f"{name}-s1-1", f"{name}-s2-1"} <= set(cluster.children(name)["RayJob"])
    status = cluster.until(name, "Succeeded", patience=90.0)
    assert [stage["attempt"] for stage in status["stages"]] == [1] * 4


def test_every_manifest_is_taken(cluster):
    """`kubectl apply -k` of everything under k8s/, as far as this cluster has the kinds, checked by its own API server."""
    if not cluster.real:
        pytest.skip("the fake API server has no Deployments; its own checks of these files are in test_references.py")
    # A dry run makes no namespace, and what belongs into one that is missing is refused.
    missing = not cluster.kubectl_as_is("get", "namespace", "terrace", "--ignore-not-found", "-o", "name")
    if missing:
        cluster.kubectl_as_is("create", "namespace", "terrace")
    try:
        for folder in (".", "overlays/kueue", "overlays/mlflow", "overlays/s3"):
            answer = cluster.kubectl_as_is("apply", "--dry-run=server", "--validate=strict", "-k", str(ROOT / "k8s" / folder))
            assert "serviceaccount/terrace-operator" in answer or folder != "."
    finally:
        if missing:
            cluster.kubectl_as_is("delete", "namespace", "terrace", "--wait=false")


@pytest.mark.slow  # half a minute of silence; with time under control: test_operator.py
def test_a_node_that_dies_is_replaced_and_fenced(cluster):
    fence = 60 if cluster.stall_seconds > 30 else 1
    policy = {"stallTimeoutSeconds": cluster.stall_seconds, "fenceTimeoutSeconds": fence, "backoffSeconds": 0.2}
    name = cluster.create("node", behaviour={"steps": 20, "step_seconds": 0.2}, failurePolicy=policy)
    cluster.until(name, lambda status: status["stages"][0]["step"] >= 3, "at step 3")
    cluster.kill_node(f"{name}-s0-1")
    status = cluster.until(name, "Succeeded", patience=90.0)
    assert (status["stages"][0]["attempt"], status["stages"][0]["infraRestarts"]) == (2, 1)


def test_delete_leaves_nothing(cluster):
    name = cluster.create("gone", behaviour={"steps": 200})
    cluster.until(name, lambda status: status["stages"][0]["step"] >= 1, "running")
    assert {"RayJob", "ConfigMap", "Role", "Pod"} <= set(cluster.children(name))
    cluster.api.delete("Curriculum", name)
    end = time.monotonic() + cluster.patience
    while time.monotonic() < end and not (is_gone(cluster, name) and not cluster.children(name)):
        time.sleep(0.1)
    assert cluster.children(name) == {}


def test_what_cannot_change_and_what_is_wrong_is_refused(cluster):
    name = cluster.create("fixed", behaviour={"steps": 3})
    with pytest.raises(Refused, match=r"recipe\.model cannot change"):
        cluster.edit(name, recipe={"model": {"pretrained": "s3://bucket/other"}})
    with pytest.raises(Refused, match=r"storage\.uri cannot change"):
        cluster.edit(name, storage={"uri": "s3://bucket/other"})
    with pytest.raises(Refused, match="at least one part must train"):
        cluster.create("wrong", stages=[tiny_stage("warmup", train={})])
    with pytest.raises(Refused, match="unknown field"):
        cluster.create("wrong", stages=[tiny_stage("warmup", sequence_lenght=8)])
    cluster.until(name, "Succeeded")


@pytest.mark.slow  # the same at every single write, in one process: test_operator.py
def test_operator_killed_in_every_phase(cluster):
    """kill -9 and a restart while queued, starting, running, backing off, suspended and between stages: nothing is lost."""
    behaviour = {"steps": 60, "step_seconds": 0.1, "stages": {"align": {"steps": 6, "attempts": {"1": {"exit": 1}}}}}
    cluster.hold_queue()
    name = cluster.create("killed", behaviour=behaviour, queue=cluster.queue, failurePolicy={"backoffSeconds": 2, "backoffCapSeconds": 2})

    def kill_and_restart():
        cluster.kill()
        time.sleep(0.2)
        cluster.start()

    cluster.until(name, "Queued")
    kill_and_restart()
    cluster.open_queue()
    cluster.until(name, lambda s: s["stages"][0]["phase"] in ("Starting", "Running"), "starting")
    kill_and_restart()
    cluster.until(name, lambda s: s["stages"][0]["step"] >= 3, "running")
    kill_and_restart()
    cluster.edit(name, suspend=True)
    kill_and_restart()
    cluster.until(name, "Suspended")
    kill_and_restart()
    cluster.edit(name, suspend=False)
    cluster.until(name, lambda s: s["stages"][1]["phase"] == "BackingOff", "backing off")
    kill_and_restart()
    status = cluster.until(name, "Succeeded")
    kill_and_restart()
    # The program goes on while the operator is away, so the first stage may end before the suspend is seen: then it has one attempt.
    assert [(s["restarts"], s["infraRestarts"]) for s in status["stages"]] == [(0, 0), (1, 0)]
    assert status["stages"][0]["attempt"] in (1, 2)
    assert status["stages"][1]["attempt"] == 2


@pytest.mark.slow  # a minute
def test_operator_killed_at_random_again_and_again(cluster):
    """22 times kill -9 and a restart while three curricula run: attempts and budgets come out as if nothing had been."""
    slow = {"steps": 60, "step_seconds": 0.3}
    broken = slow | {"stages": {"align": {"steps": 6, "attempts": {"1": {"exit": 1}}}}}
    names = [cluster.create("k1", behaviour=slow), cluster.create("k2", behaviour=broken, failurePolicy={"backoffSeconds": 1}),
             cluster.create("k3", behaviour=slow, queue=cluster.queue)]  # fmt: skip
    numbers = random.Random(7)
    for _ in range(22):
        time.sleep(numbers.uniform(0.5, 3.0) * (1 if not cluster.real else 5))
        cluster.kill()
        cluster.start()
    for name in names:
        status = cluster.until(name, "Succeeded", patience=120.0)
        expected = [(1, 0, 0), (2, 1, 0)] if name.startswith("k2") else [(1, 0, 0), (1, 0, 0)]
        assert [(stage["attempt"], stage["restarts"], stage["infraRestarts"]) for stage in status["stages"]] == expected, name


def test_lost_watches_and_forgotten_history_lose_nothing(cluster):
    """410 Gone on every watch, again and again, while a curriculum runs."""
    if cluster.real:
        pytest.skip("a real API server's history cannot be compacted from here")
    name = cluster.create("watches", stages=FIVE[:3], behaviour={"steps": 10})
    for _ in range(20):
        cluster.server.store.compact()
        time.sleep(0.1)
    cluster.until(name, "Succeeded")


@pytest.mark.slow  # a minute without news; call by call under a clock of its own: test_idle.py
def test_an_idle_operator_asks_little_of_this_server(cluster, record_property):
    """Beside its lease the operator asks for nothing of ten curricula that run and say nothing new."""
    cluster.stop()
    cluster.lease_seconds, former = 15.0, cluster.lease_seconds
    cluster.start()
    try:
        long = {"stallTimeoutSeconds": 7200}
        names = [cluster.create("idle", behaviour={"steps": 4, "step_seconds": 100_000}, failurePolicy=long) for _ in range(10)]
        for name in names:
            cluster.until(name, lambda status: status.get("phase") == "Running", "running", 120.0)
        cluster.until(cluster.silent, "Succeeded", patience=120.0)  # what other tests left behind is news
        time.sleep(20)
        before = api_calls(cluster)
        time.sleep(60)
        made = api_calls(cluster) - before
        lease = sum(count for (kind, _), count in made.items() if kind == "Lease")
        others = {key: count for key, count in made.items() if key[0] != "Lease" and count}
        record_property("note", f"10 curricula, 1 minute: {lease:.0f} calls for the lease, {sum(others.values()):.0f} others")
        assert 0 < lease <= 2 * 60 / (15 / 4) + 4
        assert sum(others.values()) <= 8, (others, cluster.log(6000))  # one list and one new watch per kind every five minutes
        for name in names:
            cluster.api.delete("Curriculum", name)
    finally:
        cluster.stop()
        cluster.lease_seconds = former
        cluster.start()


def api_calls(cluster) -> Counter[tuple[str, str]]:
    """(kind, method) -> calls that the operator's own metrics count, whatever the server."""
    calls: Counter[tuple[str, str]] = Counter()
    for line in cluster.metrics().splitlines():
        if line.startswith("terrace_api_calls_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            calls[labels["kind"], labels["method"]] += float(line.rsplit(" ", 1)[1])
    return calls


def test_the_operator_was_never_refused_a_right(cluster):
    """The last of the shared cluster's tests: all of the above ran under the Role of k8s/operator/rbac.yaml."""
    if cluster.real:
        pytest.skip("a real API server tells this in its audit log only")
    users = {user for user, *_ in cluster.server.requests}
    assert "system:serviceaccount:terrace:terrace-operator" in users
    assert cluster.server.access.denied == []


def test_health_readiness_and_metrics(crd, tmp_path):
    with Server(crd, namespace="terrace") as server:
        harness = FakeHarness(server, tmp_path)
        harness.start()
        try:
            name = harness.create("metrics")
            harness.until(name, "Succeeded")
            assert harness.read("/healthz") == "ok\n"
            assert harness.read("/readyz") == "ok\n"
            end = time.monotonic() + 10
            while (metrics := harness.metrics()).count('reason="Succeeded"') == 0 and time.monotonic() < end:
                time.sleep(0.1)
            assert "terrace_leader 1.0" in metrics
            counted = [line for line in metrics.splitlines() if line.startswith(("terrace_events_total", "terrace_reconcile_errors"))]
            assert 'terrace_events_total{reason="StageCompleted"} 2.0' in counted, (counted, harness.log(6000))
            assert 'terrace_api_calls_total{code="200",kind="Curriculum",method="PUT"}' in metrics
            assert all(line.startswith("{") for line in harness.log(10**6).splitlines())  # structured logs
        finally:
            harness.stop()


def test_stand_in_program_speaks_the_same_as_the_simulated_one(crd, tmp_path):
    """The program of the real-cluster suite, run here against the fake API server."""
    import json
    import subprocess
    import sys

    from cluster_world import HERE

    from terrace.cluster.manifests import progress_config_map, trainer_access

    with Server(crd) as server:
        owner = server.store.create(tiny_curriculum("tiny"))
        for body in (progress_config_map(owner), *trainer_access(owner)):
            server.store.create(body)
        (tmp_path / "token").write_text(server.access.token_for("default", "tiny-trainer"))
        (tmp_path / "ca.crt").write_bytes(server.authority.file.read_bytes())
        environment = {**os.environ, "STAND_IN_API": server.url, "TERRACE_NAMESPACE": "default", "TERRACE_PROGRESS": "tiny-progress",
                       "STAND_IN_ACCOUNT": str(tmp_path), "STAND_IN": json.dumps({"steps": 6, "step_seconds": 0.01})}  # fmt: skip

        def run(attempt, **behaviour):
            words = [sys.executable, str(HERE / "stand_in.py"), "recipe.yaml", "--run-dir", "s3://x", "--stage", "warmup", "--attempt"]
            values = environment | ({"STAND_IN": json.dumps(behaviour)} if behaviour else {})
            return subprocess.run([*words, str(attempt)], env=values, timeout=30).returncode

        def data(key):
            return json.loads(server.store.objects["ConfigMap"]["tiny-progress"]["data"][key])

        stop = {"stage": "warmup", "attempt": 1, "stop": "suspend"}
        server.store.patch("ConfigMap", "tiny-progress", {"data": {"directive.json": json.dumps(stop)}})
        assert run(1) == 143
        assert data("progress.json")["exit"]["status"] == 143
        failing = {"steps": 4, "step_seconds": 0.01, "exit": 1}
        assert [run(attempt, **failing) for attempt in (2, 3, 4, 5)] == [1] * 4  # a failure stays one, however often it is tried
        assert run(6) == 0
        assert data("progress.json")["result"]["steps"] == 6
        assert server.access.denied == []
