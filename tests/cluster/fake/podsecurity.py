"""PodSecurity `restricted`, as its admission plugin checks it."""

from __future__ import annotations

from typing import Any

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def violations(pod: dict[str, Any]) -> list[str]:
    spec = pod["spec"]
    shared = spec.get("securityContext") or {}
    found = [f"{key}=true" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    for volume in spec.get("volumes", ()):
        kind = next((key for key in volume if key != "name"), "")
        if kind not in VOLUMES:
            found.append(f"restricted volume types (volume {volume['name']!r} uses {kind})")
    for container in [*spec.get("containers", ()), *spec.get("initContainers", ())]:
        own = container.get("securityContext") or {}
        name = container["name"]
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(f"allowPrivilegeEscalation != false (container {name!r})")
        if own.get("privileged"):
            found.append(f"privileged (container {name!r})")
        if "ALL" not in (own.get("capabilities") or {}).get("drop", ()):
            found.append(f"unrestricted capabilities (container {name!r} must drop ALL)")
        if not own.get("runAsNonRoot", shared.get("runAsNonRoot")):
            found.append(f"runAsNonRoot != true (container {name!r})")
        if own.get("runAsUser", shared.get("runAsUser")) == 0:
            found.append(f"runAsUser=0 (container {name!r})")
        profile = (own.get("seccompProfile") or shared.get("seccompProfile") or {}).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            found.append(f"seccompProfile (container {name!r})")
        if any(port.get("hostPort") for port in container.get("ports", ())):
            found.append(f"hostPort (container {name!r})")
    return found


def enforce(kind: str, body: dict[str, Any], old: dict[str, Any] | None) -> None:
    """An admission hook for the fake store: pods that break the profile are refused, as in a labelled namespace."""
    from terrace.cluster.api import Refused

    if kind == "Pod" and old is None and (broken := violations(body)):
        raise Refused(f'pods "{body["metadata"]["name"]}" is forbidden: violates PodSecurity "restricted:latest": {", ".join(broken)}', 403)
