"""Generate the CustomResourceDefinition of `Curriculum` from the typed models: one source of truth for files and clusters.

Kubernetes accepts a *structural* subset of OpenAPI 3.0, so pydantic's JSON Schema is rewritten: references are inlined, `anyOf
[X, null]` becomes X (a null is pruned by the API server; `nullable` only where null means something else than the default),
tuples become arrays, map keys get a length rule, and every string, list and map gets a length limit (the API server
refuses CEL rules whose worst case it cannot bound). `python -m terrace.cluster.crd` writes `k8s/crds/curricula.yaml`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from terrace.cluster.cel_rules import FIELD_RULES, MODEL_RULES, ROOT_RULES
from terrace.cluster.cluster_schema import CurriculumSpec
from terrace.cluster.status_schema import CurriculumStatus

GROUP, VERSION, PLURAL, KIND = "terrace.dev", "v1alpha1", "curricula", "Curriculum"
API_VERSION = f"{GROUP}/{VERSION}"
LONG_TEXT = {"description": 4096, "notes": 2048, "message": 2048}
DEFAULT_TEXT_LENGTH, DEFAULT_ITEMS = 1024, 64
KEPT = (
    "type",
    "minimum",
    "maximum",
    "pattern",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "enum",
)
# Lists whose items have a name: the API server refuses two of one name, and server-side apply merges them.
LIST_MAPS = {
    "CurriculumStatus.conditions": "type",
    "CurriculumStatus.stages": "name",
    "Runtime.env": "name",
    "ClusterStorage.volumes": "mountPath",
}


def structural(schema: dict[str, Any], definitions: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Rewrite one JSON Schema node into a structural OpenAPI node. `path` is `Model.field` of the node, for texts and rules."""
    nullable = False
    if "anyOf" in schema:
        branches = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
        nullable = len(branches) < len(schema["anyOf"]) and schema.get("default") is not None
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        if len(branches) > 1:
            return _untyped(branches, rest, path)
        schema = {**branches[0], **rest}
    if "$ref" in schema:
        model = schema["$ref"].rsplit("/", 1)[-1]
        described = {key: value for key, value in schema.items() if key in ("default", "description")}
        return _finish(_object(model, definitions[model], definitions), described, path, nullable)
    if "const" in schema:
        schema = {**schema, "enum": [schema["const"]]}
    node: dict[str, Any] = {key: schema[key] for key in KEPT if key in schema}
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if exclusive in schema:
            # The API server compares a whole number with the whole part of a bound, so 0 would not be below 0.5: such a bound is
            # inclusive there, and the operator refuses the bound itself.
            whole = float(schema[exclusive]).is_integer()
            node |= {bound: schema[exclusive], **({exclusive: True} if whole else {})}
    if node.get("type") == "integer":
        node["format"] = "int64"
    if node.get("type") == "string" and "enum" not in node:
        node.setdefault("maxLength", LONG_TEXT.get(path.rsplit(".", 1)[-1], DEFAULT_TEXT_LENGTH))
    if node.get("type") == "array":
        items = schema["prefixItems"][0] if "prefixItems" in schema else schema["items"]
        node["items"] = structural(items, definitions, path + "[]")
        node.setdefault("maxItems", DEFAULT_ITEMS)
        node["x-kubernetes-list-type"] = "atomic"
        if path in LIST_MAPS:
            node |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [LIST_MAPS[path]]}
    if node.get("type") == "object":
        node |= _map(schema, definitions, path)
    return _finish(node, schema, path, nullable)


def _untyped(branches: list[dict[str, Any]], schema: dict[str, Any], path: str) -> dict[str, Any]:
    """`int | [int, int]`: a structural schema cannot say two types, but limits apply to whichever type is given."""
    node: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}
    for branch in branches:
        node |= {key: branch[key] for key in ("minItems", "maxItems") if key in branch}
    if {branch.get("type") for branch in branches} == {"integer", "array"}:
        node["minimum"] = 1
    return _finish(node, schema, path, nullable=False)


def _map(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    values = schema.get("additionalProperties")
    patterns = schema.get("patternProperties")
    if patterns:
        values = next(iter(patterns.values()))
    if not isinstance(values, dict) or not values:
        return {"x-kubernetes-preserve-unknown-fields": True}
    node: dict[str, Any] = {"additionalProperties": structural(values, definitions, path + "{}")}
    node["maxProperties"] = schema.get("maxProperties", DEFAULT_ITEMS)
    if patterns:  # `matches` on keys is over the API server's cost budget: it cannot bound their length; the operator checks it
        node["x-kubernetes-validations"] = [
            {"rule": "self.all(key, size(key) >= 1 && size(key) <= 63)", "message": "names have 1 to 63 characters"}
        ]
    return node


def _object(model: str, definition: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    if "properties" not in definition:
        return structural(definition, definitions, model)
    properties = {name: structural(field, definitions, f"{model}.{name}") for name, field in definition["properties"].items()}
    node: dict[str, Any] = {"type": "object", "properties": properties}
    if definition.get("required"):
        node["required"] = definition["required"]
    if rules := MODEL_RULES.get(model):
        node["x-kubernetes-validations"] = [rule.as_openapi() for rule in rules]
    if definition.get("description"):
        node["description"] = " ".join(definition["description"].split())
    return node


def _finish(node: dict[str, Any], schema: dict[str, Any], path: str, nullable: bool) -> dict[str, Any]:
    default = schema.get("default")
    if isinstance(default, dict):  # in full: the API server checks a default against the rules before it fills nested defaults
        default = {key: value for key, value in default.items() if value is not None}
    if default is not None and not path.startswith(("CurriculumStatus", "StageStatus", "CheckpointStatus", "Condition", "UsageStatus")):
        node["default"] = list(default) if isinstance(default, tuple) else default
    if nullable:
        node["nullable"] = True
    text = schema.get("description") or node.get("description")
    if text:
        node["description"] = " ".join(text.split())
    if rules := FIELD_RULES.get(path):
        node["x-kubernetes-validations"] = node.get("x-kubernetes-validations", []) + [rule.as_openapi() for rule in rules]
    return node


def _model_schema(model: type, **extra: Any) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=True)
    return _object(model.__name__, schema, schema.get("$defs", {})) | extra


def column(name: str, kind: str, path: str, description: str, wide: bool = False) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path, "description": description} | ({"priority": 1} if wide else {})


PRINTER_COLUMNS = [
    column("Phase", "string", ".status.phase", "Where the curriculum stands."),
    column("Stage", "string", ".status.currentStage", "Stage that runs or runs next."),
    column("Stages", "string", ".status.stagesDone", "Stages done of all."),
    column("Step", "string", ".status.progress", "Step of the current stage."),
    column("Restarts", "integer", ".status.restarts", "Restarts after program and infrastructure failures."),
    column("Reason", "string", ".status.conditions[?(@.type=='Progressing')].reason", "Why it is in its phase."),
    column("Age", "date", ".metadata.creationTimestamp", "Age of the resource."),
    column("Queue", "string", ".status.queue", "Kueue queue.", wide=True),
    column("GPUs", "integer", ".status.allocatedGpus", "GPUs held now.", wide=True),
    column("Checkpoint", "string", ".status.lastCheckpoint.uri", "Newest complete checkpoint.", wide=True),
]


def build_crd() -> dict[str, Any]:
    """The whole CustomResourceDefinition as plain values."""
    spec = _model_schema(CurriculumSpec, description="What to train and what it needs from the cluster.")
    status = _model_schema(CurriculumStatus, description="Where the curriculum stands; written by the operator only.")
    root = {
        "type": "object",
        "description": "A training curriculum: stages that run one after the other, each as a KubeRay RayJob.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Version of this schema."},
            "kind": {"type": "string", "description": "Always Curriculum."},
            # Not even a description: the API server refuses anything but restrictions of name and generateName here.
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
        "x-kubernetes-validations": [rule.as_openapi() for rule in ROOT_RULES],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "terrace"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "plural": PLURAL, "singular": "curriculum", "kind": KIND, "listKind": "CurriculumList",
                "shortNames": ["cur"], "categories": ["terrace"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": PRINTER_COLUMNS,
                    "schema": {"openAPIV3Schema": root},
                }
            ],
        },
    }  # fmt: skip


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors: kubectl accepts them, reviewers should not have to."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def crd_yaml() -> str:
    head = "# Generated by `python -m terrace.cluster.crd` from the typed models. Do not edit.\n"
    return head + yaml.dump(build_crd(), Dumper=_PlainDumper, sort_keys=False, width=120, allow_unicode=True)


def main() -> int:
    root = Path(__file__).resolve().parents[3]
    (root / "k8s/crds/curricula.yaml").write_text(crd_yaml(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
