"""What every object's metadata must be, as `ValidateObjectMetaAccessor` has it (kubernetes
staging/src/k8s.io/apimachinery/pkg/api/validation/objectmeta.go): name, labels, annotations, finalizers, owner references.
"""

from __future__ import annotations

from typing import Any

from terrace.cluster.pod_rules import DNS_SUBDOMAIN, LABEL_VALUE, MAX_ANNOTATIONS_BYTES, is_label_name

Manifest = dict[str, Any]


def errors(metadata: Manifest) -> list[str]:
    found = []
    name = metadata.get("name") or ""
    if not name and not metadata.get("generateName"):
        found.append("metadata.name: Required value: name or generateName is required")
    elif name and (len(name) > 253 or not DNS_SUBDOMAIN.fullmatch(name)) and ":" not in name:  # RBAC names are path segments
        found.append(f'metadata.name: Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case alphanumerics')
    for key, value in (metadata.get("labels") or {}).items():  # ValidateLabels
        if not is_label_name(key):
            found.append(f'metadata.labels: Invalid value: "{key}": name part must consist of alphanumeric characters')
        if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
            found.append(f'metadata.labels: Invalid value: "{value}": a valid label must be an empty string or consist of alphanumerics')
    annotations = metadata.get("annotations") or {}
    found += [f'metadata.annotations: Invalid value: "{key}"' for key in annotations if not is_label_name(key.lower())]
    if sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items()) > MAX_ANNOTATIONS_BYTES:
        found.append(f"metadata.annotations: Too long: may not be more than {MAX_ANNOTATIONS_BYTES} bytes")
    for finalizer in metadata.get("finalizers") or ():  # ValidateFinalizerName; of custom kinds a domain is not asked for
        if not is_label_name(finalizer):
            found.append(f'metadata.finalizers: Invalid value: "{finalizer}": name part must consist of alphanumeric characters')
    owners = metadata.get("ownerReferences") or ()
    for owner in owners:  # validateOwnerReference
        empty = [key for key in ("apiVersion", "kind", "name", "uid") if not owner.get(key)]
        found += [f"metadata.ownerReferences.{key}: must not be empty" for key in empty]
    if sum(bool(owner.get("controller")) for owner in owners) > 1:
        found.append("metadata.ownerReferences: Only one reference can have Controller set to true")
    return found
