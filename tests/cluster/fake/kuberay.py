"""A stand-in for KubeRay, Kueue and the kubelet: moves RayJobs, RayClusters, Workloads and Pods through the states seen on real ones.

KubeRay's reasons follow its source (ray-operator/controllers/ray/rayjob_controller.go, common/job.go): the submitter's Job is looked
at before Ray is asked, a submitter that is retried finds its job again or submits it anew, and a job that Ray no longer knows
once the submitter has ended is `AppFailed`. `closes` in a behaviour says how KubeRay ends the RayJob of a program that has
ended: a reason (the order of its looks was unlucky), "waits" (for its submitter, with the job's status told) or "never".

`Cluster.tick(now)` looks at what is in the store and does the next thing to each object, so tests decide how time passes. What a stage's
program does comes from the environment variable STAND_IN of its pods (JSON), the same that the stand-in program reads on a real
cluster (see `stand_in.py`). Faults are switched on from outside: dead nodes, preemption, a full queue.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fake.store import Store, stamp
from terrace.cluster.manifests import LABEL_ATTEMPT, LABEL_CURRICULUM, progress_name

Manifest = dict[str, Any]
KUBELET = "test/kubelet"


@dataclass
class Program:
    """The program of one incarnation of one attempt."""

    stage: str
    attempt: int
    cluster: str
    step: int
    total: int
    behaviour: Manifest
    next_at: float
    prefix: str  # of the stage's keys in the progress ConfigMap
    saved: int = 0  # step of its newest checkpoint; a step that fails is in none


@dataclass
class Cluster:
    store: Store
    boot_seconds: float = 0.2
    grace_seconds: float = 0.2
    quota: int | None = None  # RayJobs that Kueue admits at a time; None: all
    dead: set[str] = field(default_factory=set)  # RayJobs whose node has died: nothing of them moves any more
    programs: dict[str, Program] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    launches: list[tuple[str, int, int]] = field(default_factory=list)  # (RayJob, step it started at, time order)
    reruns: set[tuple[str, str, str]] = field(default_factory=set)
    submitters: dict[str, int] = field(default_factory=dict)  # RayJob -> submitter pods that it has lost
    refusal: tuple[str, str] | None = None  # Kueue's reason and message while it admits nothing
    preemptions: int = 0  # by priority
    messages: bool = True  # copy reasons into Workloads
    pods: bool = True  # make Pod objects (admission checks them); without: faster
    behaviour: Callable[[Manifest, str, int], Manifest] = field(default_factory=lambda: behaviour_of)
    ended: Callable[[Manifest, str, int], None] = lambda job, stage, status: None  # told when a program reports its end
    priorities: dict[str, int] = field(default_factory=dict)  # WorkloadPriorityClass -> value; the higher preempts
    numbers: random.Random = field(default_factory=lambda: random.Random(0))

    def tick(self, now: float) -> None:
        for pod in list(self.store.objects.get("Pod", {}).values()):
            self._kubelet(pod, now)
        for job in list(self.store.objects.get("RayJob", {}).values()):
            self.tick_job(job, now)

    # ------------------------------------------------------------ one RayJob

    def tick_job(self, job: Manifest, now: float) -> None:
        name = job["metadata"]["name"]
        if job["metadata"].get("deletionTimestamp"):
            self.programs.pop(name, None)
            return
        if name in self.dead:
            return
        self._kueue(job)
        job = self.store.objects["RayJob"].get(name, job)
        status = job.get("status") or {}
        state = status.get("jobDeploymentStatus", "")
        if state in ("Complete", "Failed"):
            return
        if job["spec"].get("suspend"):
            if state in ("Initializing", "Running"):
                self.programs.pop(name, None)
                self._delete_cluster(job)
                self._set(job, jobDeploymentStatus="Suspending", jobStatus="")
            elif state == "Suspending" and not self._cluster_exists(job):
                self._set(job, jobDeploymentStatus="Suspended", rayClusterName="")
            elif state == "":
                self._set(job, jobDeploymentStatus="Suspended", jobStatus="")
            return
        if state in ("", "Suspended"):
            self._start(job, now)
        elif state == "Suspending":
            if not self._cluster_exists(job):
                self._set(job, jobDeploymentStatus="Suspended", rayClusterName="")
        elif state == "Initializing" and now >= self.waits.get(name, 0):
            self._set(job, jobDeploymentStatus="Running", jobStatus="RUNNING", message="")
            self._begin(job, now)
        elif state == "Running" and (job.get("status") or {}).get("jobStatus") == "RUNNING":
            self._advance(job, now)

    def _start(self, job: Manifest, now: float) -> None:
        name = job["metadata"]["name"]
        cluster = f"{name}-{self.numbers.randrange(16**5):05x}"
        if self.pods:
            self._make_cluster(job, cluster)
        self.waits[name] = now + self.boot_seconds
        self._set(job, jobDeploymentStatus="Initializing", jobStatus="", rayClusterName=cluster)

    def _make_cluster(self, job: Manifest, cluster: str) -> None:
        body = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {
            "name": cluster, "ownerReferences": [_owner(job)]}, "spec": job["spec"]["rayClusterSpec"]}  # fmt: skip
        made = self.store.create(body)
        spec = job["spec"]["rayClusterSpec"]
        templates = [
            ("head", spec["headGroupSpec"]["template"], 1),
            ("submitter", job["spec"]["submitterPodTemplate"], 1),
        ]
        templates += [("worker", group["template"], group["replicas"]) for group in spec["workerGroupSpecs"]]
        for role, template, count in templates:
            for number in range(count):
                owner = job if role == "submitter" else made
                self.store.create({
                    "apiVersion": "v1", "kind": "Pod", "spec": template["spec"], "metadata": {
                        "name": f"{cluster}-{role}-{number}", "labels": template["metadata"]["labels"] | {"ray.io/cluster": cluster},
                        "annotations": {"rayjob": job["metadata"]["name"]}, "finalizers": [KUBELET],
                        "ownerReferences": [_owner(owner)]},
                })  # fmt: skip

    def _kubelet(self, pod: Manifest, now: float) -> None:
        """A pod that is deleted ends after its grace; on a dead node it never does."""
        name = pod["metadata"]["name"]
        if not pod["metadata"].get("deletionTimestamp") or pod["metadata"]["annotations"]["rayjob"] in self.dead:
            return
        if now >= self.waits.setdefault(name, now + self.grace_seconds):
            with self.store.lock:
                if name in self.store.objects.get("Pod", {}):
                    self.store.drop_finalizer(self.store.objects["Pod"][name], KUBELET)

    def _cluster_exists(self, job: Manifest) -> bool:
        cluster = (job.get("status") or {}).get("rayClusterName")
        return bool(cluster) and self.store.objects.get("RayCluster", {}).get(cluster) is not None

    def _delete_cluster(self, job: Manifest) -> None:
        cluster = (job.get("status") or {}).get("rayClusterName")
        if cluster and self.pods:
            self.store.delete("RayCluster", cluster, foreground=True)

    def _set(self, job: Manifest, **values: Any) -> None:
        with self.store.lock:
            current = self.store.objects.get("RayJob", {}).get(job["metadata"]["name"])
            if current is not None and current["metadata"]["uid"] == job["metadata"]["uid"]:
                self.store.modify("RayJob", {**current, "status": {**(current.get("status") or {}), **values}})

    # ------------------------------------------------------------ the program

    def _begin(self, job: Manifest, now: float) -> None:
        name, words = job["metadata"]["name"], job["spec"]["entrypoint"].split()
        stage, attempt = words[words.index("--stage") + 1], int(job["metadata"]["labels"][LABEL_ATTEMPT])
        report = self._report(job["metadata"]["labels"][LABEL_CURRICULUM], prefix_of(job))
        if (report.get("stage"), report.get("attempt")) == (stage, attempt) and report.get("result"):
            self._set(job, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", message="the stage had been done")
            self._delete_cluster(job)
            return
        behaviour = self.behaviour(job, stage, attempt)
        checkpoint = (report.get("checkpoint") or {}) if report.get("stage") == stage else {}
        start = int(checkpoint.get("step", 0))
        rerun = (job["metadata"]["labels"][LABEL_CURRICULUM], stage, words[words.index("--rerun") + 1] if "--rerun" in words else "0")
        if rerun[2] != "0" and rerun not in self.reruns:  # what the stage had written is moved aside, once per rerun
            self.reruns.add(rerun)
            start = 0
        cluster = self.store.objects["RayJob"][name]["status"]["rayClusterName"]
        self.programs[name] = Program(
            stage, attempt, cluster, start, behaviour["steps"], behaviour, now + behaviour["step_seconds"], prefix_of(job), start)
        self.launches.append((name, start, len(self.launches)))

    def _report(self, curriculum: str, prefix: str) -> Manifest:
        body = self.store.objects.get("ConfigMap", {}).get(progress_name(curriculum)) or {}
        return json.loads((body.get("data") or {}).get(f"{prefix}progress.json", "{}"))

    def _advance(self, job: Manifest, now: float) -> None:
        name = job["metadata"]["name"]
        program = self.programs.get(name)
        if program is None:  # the simulator itself was restarted
            self._begin(job, now)
            return
        if program.behaviour.get("hang") and program.step >= 1:
            return
        curriculum = job["metadata"]["labels"][LABEL_CURRICULUM]
        if self._told_to_stop(curriculum, program):
            self._write(curriculum, program, exit={"status": 143, "message": "stopped after a checkpoint"})
            self._finish(job, "Failed", "FAILED", "AppFailed", "Job entrypoint command failed with exit code 143")
        elif now >= program.next_at:
            program.step += 1
            program.next_at = now + program.behaviour["step_seconds"]
            failing = program.behaviour.get("exit")
            if failing is not None and program.step > program.total // 2:
                message = f"Job entrypoint command failed with exit code {failing}"
                self._write(
                    curriculum,
                    program,
                    exit={"status": failing, "message": program.behaviour.get("message", "it broke")},
                )
                self.ended(job, program.stage, failing)
                self._finish(job, "Failed", "FAILED", "AppFailed", message)
                return
            program.saved = program.step
            if program.step >= program.total:
                result = {
                    "steps": program.total,
                    "loss": 1.0,
                    "evaluation": {"after": program.behaviour.get("after", {})},
                }
                self._write(curriculum, program, result=result, exit={"status": 0, "message": ""})
                self.ended(job, program.stage, 0)
                self._finish(job, "Complete", "SUCCEEDED", "", "Job finished successfully")
            else:
                self._write(curriculum, program)

    def _told_to_stop(self, curriculum: str, program: Program) -> bool:
        body = self.store.objects.get("ConfigMap", {}).get(progress_name(curriculum)) or {}
        directive = json.loads((body.get("data") or {}).get(f"{program.prefix}directive.json", "{}"))
        return directive.get("stage") == program.stage and directive.get("attempt") == program.attempt

    def _write(self, curriculum: str, program: Program, **values: Any) -> None:
        report = {
            "stage": program.stage, "attempt": program.attempt, "cluster": program.cluster, "step": program.step,
            "total_steps": program.total, "metrics": {"loss": f"{2.0 / (program.step + 1):.4f}"},
            "checkpoint": {"uri": f"s3://test/{curriculum}/{program.stage}/step-{program.saved:06d}", "step": program.saved},
            **values,
        }  # fmt: skip
        with self.store.lock:
            name = progress_name(curriculum)
            if name in self.store.objects.get("ConfigMap", {}):
                self.store.patch("ConfigMap", name, {"data": {f"{program.prefix}progress.json": json.dumps(report, sort_keys=True)}})

    def evict_submitter(self, name: str) -> None:
        """The submitter pod is evicted: its Job makes another, which finds the job running, until its backoffLimit is spent."""
        job = self.store.objects["RayJob"][name]
        self.submitters[name] = self.submitters.get(name, 0) + 1
        if self.submitters[name] > job["spec"].get("submitterConfig", {}).get("backoffLimit", 2):
            self.programs.pop(name, None)
            self._set(job, jobDeploymentStatus="Failed", reason="SubmissionFailed",
                      message="Job submission has failed. Reason: BackoffLimitExceeded.")  # fmt: skip
            self._delete_cluster(job)

    def replace_head(self, name: str, now: float) -> None:
        """The head pod is replaced: Ray has forgotten the job, and the next submitter pod submits it anew, if there is one."""
        job = self.store.objects["RayJob"][name]
        self.programs.pop(name, None)
        self.submitters[name] = self.submitters.get(name, 0) + 1
        if self.submitters[name] > job["spec"].get("submitterConfig", {}).get("backoffLimit", 2):
            self._finish(job, "Failed", "RUNNING", "AppFailed", "Submitter completed but Ray job not found in RayCluster.")
        else:
            self.waits[name] = now + self.boot_seconds
            self._set(job, jobDeploymentStatus="Initializing", jobStatus="")

    def _finish(self, job: Manifest, deployment: str, ended: str, reason: str, message: str) -> None:
        program = self.programs.pop(job["metadata"]["name"], None)
        closes = program.behaviour.get("closes") if program else None
        if closes == "never":  # nothing is told: the head, or KubeRay's way to it, is gone
            self._set(job, jobStatus="RUNNING", message="")
            self.programs[job["metadata"]["name"]] = Program(**{**vars(program), "behaviour": {**program.behaviour, "hang": True}})
            return
        if closes == "waits":
            self._set(job, jobStatus=ended, message=message)
            return
        if closes:
            deployment, reason, message = "Failed", closes, "Job submission has failed. Reason: BackoffLimitExceeded."
            ended = "RUNNING" if closes == "SubmissionFailed" else ended
        self._set(job, jobDeploymentStatus=deployment, jobStatus=ended, reason=reason, message=message)
        self._delete_cluster(job)

    # ------------------------------------------------------------ Kueue

    def _kueue(self, job: Manifest) -> None:
        if "kueue.x-k8s.io/queue-name" not in job["metadata"].get("labels", {}) or not job["spec"].get("suspend"):
            return
        if (job.get("status") or {}).get("jobDeploymentStatus") not in (None, "", "Suspended"):
            return  # still ending what it had
        admitted = self.quota is None or self._holding() < self.quota
        if not admitted and (lower := self._lower_than(job)):
            self.preemptions += 1
            self.preempt(lower)  # its quota is free when KubeRay has deleted its cluster
        if self.messages:
            text = "Quota reserved" if admitted else "couldn't assign flavors to pod set workers: insufficient unused quota for gpu"
            reason, text = ("QuotaReserved", text) if admitted else self.refusal or ("Pending", text)
            if reason == "Deactivated":
                self._workload(job, "False", "Pending", text, evicted=reason)
            else:
                self._workload(job, "True" if admitted else "False", reason, text)
        if admitted:
            self.set_suspend(job["metadata"]["name"], False)

    def _holding(self) -> int:
        """RayJobs that have their quota, or whose pods still hold it."""
        return sum(1 for other in self.store.objects["RayJob"].values() if self._holds(other)
                   or (other.get("status") or {}).get("jobDeploymentStatus") == "Suspending")  # fmt: skip

    def _lower_than(self, job: Manifest) -> str | None:
        """The admitted RayJob of the lowest priority below this one's (Kueue: `withinClusterQueue: LowerPriority`)."""
        mine = self._priority(job)
        held = [(self._priority(other), name) for name, other in self.store.objects["RayJob"].items() if self._holds(other)]
        lowest = min(held, default=None)
        return lowest[1] if lowest is not None and lowest[0] < mine else None

    def reclaim(self) -> int:
        """Preempt until what is held fits the quota, the lowest priority first; how many it took."""
        held = [(self._priority(job), name) for name, job in self.store.objects.get("RayJob", {}).items() if self._holds(job)
                and "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]]  # fmt: skip
        excess = sorted(held)[: max(len(held) - (len(held) if self.quota is None else self.quota), 0)]
        for _, name in excess:
            self.preempt(name)
        return len(excess)

    def _priority(self, job: Manifest) -> int:
        return self.priorities.get(job["metadata"]["labels"].get("kueue.x-k8s.io/priority-class", ""), 0)

    def _holds(self, job: Manifest) -> bool:
        ended = (job.get("status") or {}).get("jobDeploymentStatus") in ("Complete", "Failed")
        return not job["spec"].get("suspend") and not ended and not job["metadata"].get("deletionTimestamp")

    def set_suspend(self, name: str, value: bool) -> None:
        with self.store.lock:
            job = self.store.objects.get("RayJob", {}).get(name)
            if job is not None and bool(job["spec"].get("suspend")) != value:
                self.store.modify("RayJob", {**job, "spec": {**job["spec"], "suspend": value}})

    def preempt(self, name: str) -> None:
        """What Kueue does to make room: suspend the job; KubeRay then deletes its cluster."""
        job = self.store.objects["RayJob"][name]
        if self.messages:
            self._workload(job, "False", "Pending", "preempted to accommodate a workload of higher priority", evicted="Preempted")
        self.set_suspend(name, True)

    def _workload(self, job: Manifest, reserved: str, reason: str, message: str, evicted: str = "") -> None:
        name = f"rayjob-{job['metadata']['name']}"
        conditions = [{"type": "QuotaReserved", "status": reserved, "reason": reason, "message": message}]
        if evicted:
            conditions.append({"type": "Evicted", "status": "True", "reason": evicted, "message": message})
        known = self.store.objects.get("Workload", {}).get(name)
        if known is None:
            head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
            pods = {"podSets": [{"name": "head", "count": 1, "template": {"spec": head["spec"]}}]}
            known = self.store.create({"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", "spec": pods, "metadata": {
                "name": name, "ownerReferences": [_owner(job)]}})  # fmt: skip
        times = {item["type"]: item for item in (known.get("status") or {}).get("conditions") or ()}
        for item in conditions:
            old = times.get(item["type"], {})
            same = old.get("status") == item["status"]
            item["lastTransitionTime"] = old["lastTransitionTime"] if same else stamp(self.store.clock())
        if (known.get("status") or {}).get("conditions") != conditions:
            with self.store.lock:
                if name in self.store.objects.get("Workload", {}):
                    self.store.modify("Workload", {**known, "status": {"conditions": conditions}})


def _owner(body: Manifest) -> Manifest:
    return {"apiVersion": body["apiVersion"], "kind": body["kind"], "name": body["metadata"]["name"],
            "uid": body["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True}  # fmt: skip


def environment_of(job: Manifest) -> dict[str, str]:
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    return {item["name"]: item["value"] for item in template["spec"]["containers"][0]["env"]}


def prefix_of(job: Manifest) -> str:
    return environment_of(job).get("TERRACE_PROGRESS_PREFIX", "")


def behaviour_of(job: Manifest, stage: str, attempt: int) -> Manifest:
    """What STAND_IN says of this attempt: defaults, then `stages.<name>`, then of that `attempts.<number>`."""
    given = json.loads(environment_of(job).get("STAND_IN", "{}"))
    stage_given = given.get("stages", {}).get(stage, {})
    values = {"steps": 4, "step_seconds": 0.05} | given | stage_given | stage_given.get("attempts", {}).get(str(attempt), {})
    return {key: value for key, value in values.items() if key not in ("stages", "attempts")}
