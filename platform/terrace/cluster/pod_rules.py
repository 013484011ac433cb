"""What Kubernetes says of a pod template, before anything is created: a RayJob with a template that can never become a pod would
hold its quota until its pre-running timeout, attempt after attempt.

Kubernetes checks a pod only when it is created, hours after the Curriculum was accepted and out of sight of whoever wrote it. The
rules copied are those of `ValidatePodTemplateSpec` (kubernetes pkg/apis/core/validation/validation.go; each function names the
one it follows) as far as the templates of `manifests.py` use the fields, and the grammar of image names (distribution/reference),
which the kubelet checks (InvalidImageName). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from terrace.cluster.cluster_schema import IMAGE, QUALIFIED, SUBDOMAIN

Manifest = dict[str, Any]
LABEL_NAME = re.compile(rf"(?:(?P<prefix>{SUBDOMAIN})/)?{QUALIFIED}")
LABEL_VALUE = re.compile(r"(?:[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
DNS_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(SUBDOMAIN)
PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9](?:[-a-z0-9]{0,13}[a-z0-9])?")
ENVIRONMENT_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
QUANTITY = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<suffix>m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")
SUFFIXES = {None: 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30,
            "Ti": 2.0**40, "Pi": 2.0**50}  # fmt: skip
MAX_ANNOTATIONS_BYTES = 256 * 1024
VOLUME_SOURCES = ("emptyDir", "configMap", "persistentVolumeClaim", "secret")


def pod_problems(template: Manifest) -> list[str]:
    """Everything wrong with a pod template, each with its field."""
    return [*_metadata(template.get("metadata") or {}), *_spec(template["spec"])]


def amount(quantity: str) -> float | None:
    """A Kubernetes quantity as a number of cores or bytes; None where it is none."""
    found = QUANTITY.fullmatch(quantity)
    return float(found["number"]) * SUFFIXES[found["suffix"]] if found else None


def is_label_name(text: str) -> bool:
    """IsQualifiedName: an optional DNS subdomain of at most 253 characters and `/`, then a name of at most 63."""
    found = LABEL_NAME.fullmatch(text)
    return found is not None and len(found["prefix"] or "") <= 253


def _metadata(metadata: Manifest) -> Iterator[str]:
    """ValidateLabels, ValidateAnnotations."""
    for key, value in (metadata.get("labels") or {}).items():
        if not is_label_name(key) or not LABEL_VALUE.fullmatch(value):
            yield f"metadata.labels: {key}={value} is no label"
    annotations = metadata.get("annotations") or {}
    for key in annotations:
        if not is_label_name(key.lower()):
            yield f"metadata.annotations: {key} is no qualified name"
    if sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items()) > MAX_ANNOTATIONS_BYTES:
        yield "metadata.annotations: more than 256 KiB"
    for key, value in annotations.items():
        # Kueue's own webhook: the value is a node label's name (kueue pkg/controller/jobframework/tas_validation.go).
        if key.endswith(("podset-required-topology", "podset-preferred-topology")) and not is_label_name(value):
            yield f"metadata.annotations[{key}]: {value} is no name of a node label"


def _spec(spec: Manifest) -> Iterator[str]:
    volumes = [volume["name"] for volume in spec.get("volumes") or ()]
    yield from _volumes(spec.get("volumes") or [])
    for number, container in enumerate(spec["containers"]):
        yield from (f"containers[{number}].{text}" for text in _container(container, volumes))
    for key, value in (spec.get("nodeSelector") or {}).items():  # ValidateNodeSelector: labels
        if not is_label_name(key):
            yield f"nodeSelector: {key!r} is no name of a label: [domain/]name of letters, digits, '-', '_' and '.'"
        if not LABEL_VALUE.fullmatch(value):
            yield f"nodeSelector[{key}]: {value!r} is no value of a label: at most 63 letters, digits, '-', '_' and '.'"
    for number, toleration in enumerate(spec.get("tolerations") or ()):
        yield from (f"tolerations[{number}]{text}" for text in _toleration(toleration))
    if spec.get("terminationGracePeriodSeconds", 30) < 0:
        yield "terminationGracePeriodSeconds: is negative"
    security = spec.get("securityContext") or {}
    for key in ("runAsUser", "runAsGroup", "fsGroup"):  # IsValidUserID
        if not 0 <= security.get(key, 0) <= 2_147_483_647:
            yield f"securityContext.{key}: must be between 0 and 2147483647"
    if security.get("runAsNonRoot") and security.get("runAsUser") == 0:  # the kubelet's verifyRunAsNonRoot
        yield "securityContext.runAsUser: is root, and runAsNonRoot is set"
    account = spec.get("serviceAccountName", "default")
    if not DNS_SUBDOMAIN.fullmatch(account) or len(account) > 253:
        yield f"serviceAccountName: {account!r} is no name of a ServiceAccount"
    for secret in spec.get("imagePullSecrets") or ():
        if not DNS_SUBDOMAIN.fullmatch(secret["name"]):
            yield f"imagePullSecrets: {secret['name']!r} is no name of a Secret"


def _volumes(volumes: list[Manifest]) -> Iterator[str]:
    """ValidateVolumes."""
    names: set[str] = set()
    for number, volume in enumerate(volumes):
        name = volume["name"]
        if not DNS_LABEL.fullmatch(name) or name in names:
            yield f"volumes[{number}].name: {name!r} must be a DNS label and unique"
        names.add(name)
        sources = [source for source in VOLUME_SOURCES if source in volume]
        if len(sources) != 1 or set(volume) - {"name", *sources}:
            yield f"volumes[{number}]: must have exactly one source of {', '.join(VOLUME_SOURCES)}"
            continue
        source = volume[sources[0]]
        limit = source.get("sizeLimit") if sources[0] == "emptyDir" else None
        if limit is not None and amount(limit) is None:
            yield f"volumes[{number}].emptyDir.sizeLimit: {limit!r} is no quantity"
        key = {"configMap": "name", "persistentVolumeClaim": "claimName", "secret": "secretName"}.get(sources[0])
        if key and (not DNS_SUBDOMAIN.fullmatch(source[key]) or len(source[key]) > 253):
            yield f"volumes[{number}].{sources[0]}.{key}: {source[key]!r} is no name of an object"


def _container(container: Manifest, volumes: list[str]) -> Iterator[str]:
    """validateContainers."""
    if not DNS_LABEL.fullmatch(container["name"]):
        yield f"name: {container['name']!r} must be a DNS label"
    image = container["image"]
    if image != image.strip():
        yield f"image: {image!r} must not have leading or trailing whitespace"
    elif not re.fullmatch(IMAGE, image):
        yield f"image: {image!r} is no image reference: [host[:port]/]name[:tag][@digest] in lower case"
    elif len(name := re.sub(r"(:[\w.-]+)?(@.*)?$", "", image)) > 255 or re.fullmatch(r"[0-9a-f]{64}", name):
        yield f"image: {name[:70]!r} is no name of an image: at most 255 characters, and not 64 hexadecimal digits"  # ErrNameTooLong
    yield from _environment(container)
    yield from _mounts(container, volumes)
    yield from _resources(container.get("resources") or {})
    ports = container.get("ports") or []
    for port in ports:
        if not 0 < port["containerPort"] < 65_536 or not PORT_NAME.fullmatch(port.get("name", "a")):
            yield f"ports: {port} needs a port of 1 to 65535 and a name of at most 15 of a-z, 0-9 and '-'"
    if len({port.get("name") for port in ports}) != len(ports):
        yield "ports: names must be unique"


def _environment(container: Manifest) -> Iterator[str]:
    """ValidateEnv, ValidateEnvFrom. Two variables of one name are allowed there, the last one wins; here nobody means that."""
    names: set[str] = set()
    for variable in container.get("env") or ():
        name = variable["name"]
        if not ENVIRONMENT_NAME.fullmatch(name) or name in (".", ".."):
            yield f"env: {name!r} is no name of a variable"
        if name in names:
            yield f"env: {name} is given twice"
        names.add(name)
    for source in container.get("envFrom") or ():
        if not DNS_SUBDOMAIN.fullmatch(source["secretRef"]["name"]):
            yield f"envFrom: {source['secretRef']['name']!r} is no name of a Secret"


def _mounts(container: Manifest, volumes: list[str]) -> Iterator[str]:
    """ValidateVolumeMounts; paths are compared as the kernel sees them, where `/data` and `/data/` are one."""
    seen: set[str] = set()
    for mount in container.get("volumeMounts") or ():
        path = mount["mountPath"]
        if mount["name"] not in volumes:
            yield f"volumeMounts: {mount['name']} is no volume of the pod"
        if not path.startswith("/") or ":" in path or {".", ".."} & set(path.split("/")):
            yield f"volumeMounts: {path!r} must be an absolute path without ':', '.' and '..'"
        same = "/" + "/".join(filter(None, path.split("/")))
        if same in seen:
            yield f"volumeMounts: mountPath {same} must be unique"
        seen.add(same)


def _resources(resources: Manifest) -> Iterator[str]:
    """ValidateContainerResources."""
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for kind, amounts in (("requests", requests), ("limits", limits)):
        for name, text in amounts.items():
            value = amount(text)
            if value is None:
                yield f"resources.{kind}.{name}: {text!r} is no quantity"
            elif name not in ("cpu", "memory", "ephemeral-storage") and not _is_extended(name):
                yield f"resources.{kind}: {name!r} must be a standard resource or an extended one with a domain"
            elif "/" in name and value != int(value):
                yield f"resources.{kind}.{name}: {text} must be a whole number"
    for name, text in requests.items():
        asked, limit = amount(text), amount(limits[name]) if name in limits else None
        if asked is not None and limit is not None and asked > limit:
            yield f"resources.requests.{name}: {text} must be less than or equal to the limit {limits[name]}"
        if "/" in name and text != limits.get(name):
            yield f"resources.requests.{name}: must equal the limit, as extended resources are not overcommitted"


def _is_extended(name: str) -> bool:
    """IsExtendedResourceName (kubernetes pkg/apis/core/v1/helper/helpers.go)."""
    return is_label_name(name) and "/" in name and "kubernetes.io/" not in name and not name.startswith("requests.")


def _toleration(toleration: Manifest) -> Iterator[str]:
    """ValidateTolerations."""
    key, operator = toleration.get("key", ""), toleration.get("operator", "Equal")
    if key and not is_label_name(key):
        yield f".key: {key!r} is no name of a label"
    if not key and operator != "Exists":
        yield ".operator: must be Exists when key is empty, which means to match all keys and values"
    if operator == "Exists" and toleration.get("value"):
        yield ".value: must be empty when operator is Exists"
    if operator == "Equal" and not LABEL_VALUE.fullmatch(toleration.get("value", "")):
        yield f".value: {toleration.get('value')!r} is no value of a label"
    if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
        yield ".effect: must be NoExecute when tolerationSeconds is set"
