"""kopf's part: watching. Each handler puts one object into the cache and wakes its Curriculum; nothing is decided here.

`kopf.on.event` handlers store nothing on the resources (no finalizer, no annotations), so a Curriculum can be deleted while the
operator is down, and its children go with it by their ownerReferences.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import kopf

from terrace.cluster.api import KINDS
from terrace_operator.runtime import Runtime

MANAGED = {"app.kubernetes.io/managed-by": "terrace-operator"}


def register(registry: kopf.OperatorRegistry, runtime: Runtime, absent: frozenset[str]) -> None:
    """Watch curricula and what belongs to them, but for kinds that the cluster does not know (kopf would never look again)."""

    def watch(kind: str, labels: dict[str, str] | None = None) -> None:
        if kind in absent:
            return
        group_version, plural = KINDS[kind].group_version, KINDS[kind].plural
        group, _, version = group_version.rpartition("/")
        resource = (group, version, plural) if group else (version, plural)

        @kopf.on.event(*resource, registry=registry, labels=labels, id=f"watch-{plural}")
        async def handler(event: dict[str, Any], **_: Any) -> None:
            body = {"apiVersion": group_version, "kind": kind, **event["object"]}
            runtime.seen(kind, body, deleted=event["type"] == "DELETED")

    watch("Curriculum")
    watch("RayJob", MANAGED)
    watch("ConfigMap", MANAGED)
    watch("Workload")

    @kopf.on.login(registry=registry, id="login")
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        inside = os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG")
        return kopf.login_with_service_account(**kwargs) if inside else kopf.login_via_client(**kwargs)

    @kopf.on.startup(registry=registry, id="settings")
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.scanning.disabled = True  # no list of namespaces and CRDs: a namespaced Role is enough
        settings.posting.enabled = False  # events are the operator's own
        settings.watching.server_timeout = 300
        settings.watching.reconnect_backoff = 0.5
        settings.peering.standalone = True
        logging.getLogger("kopf.objects").setLevel(logging.WARNING)
