"""The `kubernetes` launcher: creates the `Curriculum`, follows its status, and passes a person's wishes on as edits of its spec.

The operator in the cluster runs the stages; this process may come and go. A run is named `k8s://NAMESPACE/NAME`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from terrace.cluster.api import AlreadyExists, Api, ApiError, Conflict, KindAbsent, Refused
from terrace.cluster.crd import API_VERSION, KIND
from terrace.cluster.credentials import connect
from terrace.cluster.manifests import LABEL_CURRICULUM, LABEL_STAGE
from terrace.cluster.render import load_cluster, render_curriculum
from terrace.errors import InputError, TerraceError
from terrace.recipe.schema import Recipe

Manifest = dict[str, Any]
REFERENCE = re.compile(r"^k8s://(?P<namespace>[a-z0-9-]+)/(?P<name>[a-z0-9-]+)$")
POLL_SECONDS = 2.0
NO_KIND = "the cluster does not know the kind Curriculum: kubectl apply -k k8s/ installs it"


@dataclass(frozen=True)
class Reference:
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"k8s://{self.namespace}/{self.name}"


def parse_reference(text: str) -> Reference | None:
    """A run on Kubernetes, None where the text names something else (a directory). `Path` drops one slash: both forms count."""
    found = REFERENCE.match(str(text).replace("k8s:/", "k8s://", 1) if not str(text).startswith("k8s://") else str(text))
    return Reference(found["namespace"], found["name"]) if found else None


def launch(recipe: Recipe, cluster_file: Path, name: str | None = None, namespace: str | None = None,
           api: Api | None = None) -> Reference:  # fmt: skip
    """Create the Curriculum or bring the existing one to this recipe. InputError where the API server refuses it."""
    api = api or connect(namespace)
    body = render_curriculum(recipe, load_cluster(cluster_file), name, api.namespace)
    apply(api, body)
    return Reference(api.namespace, body["metadata"]["name"])


def apply(api: Api, body: Manifest) -> Manifest:
    """Create, or replace the spec of what is there; wishes (suspend, paused, ...) that the file does not speak of stay."""
    name = body["metadata"]["name"]
    try:
        for _ in range(5):
            current = api.get(KIND, name)
            if current is None:
                try:
                    return api.create(body)
                except AlreadyExists:
                    continue
            kept = {key: current["spec"][key] for key in ("suspend", "paused", "cancelled", "resumeToken", "rerunFrom")
                    if key in current["spec"]}  # fmt: skip
            try:
                return api.replace({**current, "spec": {**kept, **body["spec"]}})
            except Conflict:
                continue
    except Refused as error:
        raise InputError(f"the API server refused Curriculum {name}: {error}") from error
    except KindAbsent as error:
        raise InputError(NO_KIND) from error
    except ApiError as error:
        if error.code == 404:
            raise InputError(f"there is no namespace {api.namespace}: kubectl create namespace {api.namespace}") from error
        raise
    raise TerraceError(f"Curriculum {name} keeps changing while it is applied: try again")


WISHES: dict[str, Callable[[str | None], Manifest]] = {
    "pause": lambda stage: {"paused": True},
    "suspend": lambda stage: {"suspend": True},
    "cancel": lambda stage: {"cancelled": True},
    "resume": lambda stage: {
        "paused": False, "suspend": False, "rerunFrom": stage,
        "resumeToken": datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ"),
    },
}  # fmt: skip


def request(reference: Reference, wish: str, stage: str | None = None, api: Api | None = None) -> None:
    """pause, suspend, cancel or resume (with `stage`: run again from it). InputError where nothing could come of it."""
    api = api or connect(reference.namespace)
    body = _read(reference, api)
    if why := _in_vain(body, wish, stage):
        raise InputError(f"{reference}: {why}")
    try:
        api.patch(KIND, reference.name, {"apiVersion": API_VERSION, "kind": KIND, "spec": WISHES[wish](stage)})
    except Refused as error:
        raise InputError(f"{reference}: {error}") from error


def _in_vain(body: Manifest, wish: str, stage: str | None) -> str | None:
    """Why a wish would never come true; None where it can."""
    spec, phase = body["spec"], (body.get("status") or {}).get("phase", "Pending")
    if spec.get("cancelled"):
        return f"it was cancelled, which is for good; there is nothing to {wish} (make a new Curriculum)"
    names = [item["name"] for item in spec["recipe"]["stages"]]
    if stage is not None and stage not in names:
        return f"there is no stage {stage}; its stages are {', '.join(names)}"
    if phase in ("Succeeded", "Failed") and wish != "resume":
        return f"it has {phase.lower()}; there is nothing to {wish}"
    if phase == "Succeeded" and stage is None:
        return "all its stages are done; --from STAGE runs stages again"
    waits = phase in ("Paused", "Suspended", "Failed") or spec.get("paused") or spec.get("suspend")
    if wish == "resume" and stage is None and not waits:
        return f"it is {phase.lower()} and waits for nobody; there is nothing to resume"
    return None


def read_status(reference: Reference, api: Api | None = None) -> Manifest:
    """The status as the operator wrote it, without the state machine's own values."""
    body = _read(reference, api or connect(reference.namespace))
    return {key: value for key, value in (body.get("status") or {}).items() if key != "controller"}


def _read(reference: Reference, api: Api) -> Manifest:
    try:
        body = api.get(KIND, reference.name)
    except KindAbsent as error:
        raise InputError(NO_KIND) from error
    if body is None:
        raise InputError(f"{reference}: there is no such Curriculum")
    return body


def describe(status: Manifest) -> str:
    """One line: phase, stage, step, why."""
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    why = conditions.get("Progressing", {})
    accepted = conditions.get("Accepted", {})
    text = why.get("message") or why.get("reason", "")
    if accepted.get("status") == "False":
        text = accepted.get("message", text)
    parts = [status.get("phase", "Pending"), f"stages {status.get('stagesDone', '0')}", status.get("currentStage") or "",
             status.get("progress") or "", text]  # fmt: skip
    return "  ".join(part for part in parts if part)


def follow(reference: Reference, show: Callable[[str], None] = print, api: Api | None = None) -> int:
    """Show changes until the curriculum ends or waits for a person. Exit status: 0 succeeded, 143 suspended or paused, 1 else."""
    api = api or connect(reference.namespace)
    for status in _changes(reference, api, show):
        phase = status.get("phase")
        if phase == "Succeeded":
            return 0
        if phase in ("Suspended", "Paused"):
            return 143
        if phase == "Failed":
            failed = next((c for c in status.get("conditions", ()) if c["type"] == "Failed"), {})
            return 2 if failed.get("reason") == "InputWrong" else 1
    return 1


def _changes(reference: Reference, api: Api, show: Callable[[str], None]) -> Iterator[Manifest]:
    last, failures = "", 0
    while True:
        try:
            body = _read(reference, api)
            status, failures = body.get("status") or {}, 0
        except ApiError as error:  # an API server that restarts is no reason to leave
            failures += 1
            if failures > 30:
                raise
            show(f"{reference}: {error}; trying again")
            time.sleep(POLL_SECONDS)
            continue
        line = describe(status)
        if line != last:
            show(f"{reference}  {line}")
            last = line
        # Only what speaks of the newest edit decides: a resume must not be answered by the old "Suspended".
        if status.get("observedGeneration", 0) >= body["metadata"].get("generation", 0):
            yield status
        time.sleep(POLL_SECONDS)


def pod_logs(reference: Reference, stage: str | None = None, follow: bool = False, api: Api | None = None) -> Iterator[str]:
    """Lines of the submitter pods (the program's output), newest attempt last. Needs the caller's own right to read logs.

    InputError where there are none: it says where else to look.
    """
    api = api or connect(reference.namespace)
    body = _read(reference, api)
    names = [item["name"] for item in body["spec"]["recipe"]["stages"]]
    selector = f"{LABEL_CURRICULUM}={reference.name},app.kubernetes.io/component=submitter"
    if stage is not None:
        if stage not in names:
            raise InputError(f"{reference}: there is no stage {stage}; its stages are {', '.join(names)}")
        selector += f",{LABEL_STAGE}={names.index(stage)}"
    pods = sorted(api.list("Pod", selector), key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
    if not pods:
        uri = body["spec"]["storage"]["uri"]
        raise InputError(
            f"{reference}: no pod{f' of stage {stage}' if stage else ''} is left to read from ({describe(body.get('status') or {})}); "
            f"what the workers logged lies in {uri}/stages/*/attempts/ (`terrace logs {uri}` where that can be reached)"
        )
    for pod in pods:
        yield from api.pod_log(pod["metadata"]["name"], follow=follow and pod is pods[-1])
