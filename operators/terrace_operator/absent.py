"""What a cluster lacks before a Curriculum can run, in words that say how to get it. Pure.

KubeRay and Kueue are other people's: one that is not installed is no failure of an attempt and spends no budget. Nothing is created
until it is there, and then everything goes on by itself.
"""

from __future__ import annotations

from terrace.cluster.api import KINDS
from terrace.cluster.cluster_schema import CurriculumSpec

REASONS = {"RayJob": "KubeRayAbsent", "Workload": "KueueAbsent"}
INSTALL = {
    "RayJob": "install KubeRay 1.7 or later: helm install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm/",
    "Workload": "install Kueue 0.15 or later: helm install kueue oci://registry.k8s.io/kueue/charts/kueue --namespace kueue-system "
    "--create-namespace, or leave spec.queue out",
}


def lacking(spec: CurriculumSpec, absent: frozenset[str]) -> list[str]:
    """Kinds that this Curriculum needs and the cluster does not know."""
    needed = ["RayJob", *(["Workload"] if spec.queue and spec.queue.scheduler == "kueue" else [])]
    return [kind for kind in needed if kind in absent]


def reason(kinds: list[str]) -> str:
    return REASONS[kinds[0]]


def message(kinds: list[str]) -> str:
    """One sentence for each: what is missing, and how to install it."""
    texts = [f"the cluster does not know the kind {kind} ({KINDS[kind].group_version}): {INSTALL[kind]}" for kind in kinds]
    return "; ".join(texts) + ". It starts by itself then"
