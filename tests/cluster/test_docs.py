"""The documentation says what the code does: reference, runbook, reasons."""

from __future__ import annotations

import ast
import re

from cluster_world import ROOT

from terrace.cluster.reference import reference
from terrace_operator import reasons

WORDS = {  # words of Kubernetes, Ray and our own phases that look like reasons
    "Accepted", "Complete", "ConfigMap", "Curriculum", "Deactivated", "Degraded", "Evicted", "Failed", "False", "GatePassed",
    "Initializing", "Not", "Progressing", "QueuePreempted", "Queued", "RayJob", "ReplicaFailure", "Restarting",
    "StageCleared", "Suspending", "True", "Unknown", "Volcano", "Workload", "YuniKorn",
}  # fmt: skip


def test_resource_reference_is_the_generated_one():
    committed = (ROOT / "docs/kubernetes-reference.md").read_text()
    assert committed == reference(), "run `python -m terrace.cluster.reference docs/kubernetes-reference.md`"


def test_every_reason_has_a_runbook_entry():
    text = (ROOT / "docs/kubernetes.md").read_text().split("## Runbook")[1]
    assert [reason for reason in reasons.ALL if f"`{reason}`" not in text] == []


def test_every_reason_in_the_code_is_listed():
    """Every word in CamelCase in the files that make conditions is a listed reason, an event, a phase, or a word of Kubernetes."""
    from terrace_operator.status import EVENTS

    found = set()
    for name in ("absent", "status", "conditions", "observe", "recipes"):
        for node in ast.walk(ast.parse((ROOT / f"operators/terrace_operator/{name}.py").read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"([A-Z][a-z]+)+", node.value):
                found.add(node.value)
    assert found - set(reasons.ALL) - {reason for reason, _ in EVENTS.values()} - WORDS == set()
    assert {"CreateRefused", "Killed", "WaitingForQuota", "OldPodsTerminating"} <= found
