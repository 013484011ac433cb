"""Why the API server would refuse a CustomResourceDefinition: names, structural schema, defaults, list types, rules and their cost.

Sources of the rules, by their number in the comments:
[1] kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions ("Specifying a structural schema",
    "Defaulting", "Validation rules"),
[2] kubernetes staging/src/k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation/validation.go,
[3] kubernetes staging/src/k8s.io/apiextensions-apiserver/pkg/apiserver/schema/validation.go (ValidateStructural),
[4] kubernetes.io/docs/reference/kubernetes-api/extend-resources/custom-resource-definition-v1 (JSONSchemaProps),
[5] kubernetes.io/docs/reference/using-api/server-side-apply ("Merge strategy": list and map types).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fake.cel_cost import cost_errors
from fake.schema import cel_errors, schema_errors, unknown_fields

Schema = dict[str, Any]
PRESERVE, INT_OR_STRING = "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"
RULES, LIST_TYPE, LIST_KEYS = "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"
# [4] the fields of JSONSchemaProps that apiextensions.k8s.io/v1 has; [1] those of them that a structural schema may not use are apart.
KNOWN = {
    "type", "format", "title", "description", "default", "nullable", "enum", "maximum", "minimum", "exclusiveMaximum",
    "exclusiveMinimum", "maxLength", "minLength", "pattern", "maxItems", "minItems", "multipleOf", "maxProperties", "minProperties",
    "required", "items", "properties", "additionalProperties", "allOf", "anyOf", "oneOf", "not", "example", "externalDocs",
    "uniqueItems", PRESERVE, INT_OR_STRING, RULES, LIST_TYPE, LIST_KEYS, "x-kubernetes-map-type", "x-kubernetes-embedded-resource",
}  # fmt: skip
FORBIDDEN = {"$ref", "definitions", "dependencies", "deprecated", "discriminator", "id", "patternProperties", "readOnly", "writeOnly",
             "xml", "uniqueItems"}  # fmt: skip
TYPES = {"object", "array", "string", "integer", "number", "boolean"}
DNS_LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
DNS_SUBDOMAIN = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$")
VERSION = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
COLUMN_TYPES = {"integer", "number", "string", "boolean", "date"}
REASONS = {"FieldValueInvalid", "FieldValueForbidden", "FieldValueRequired", "FieldValueDuplicate"}


def errors(crd: dict[str, Any]) -> list[str]:
    """Everything that the API server would say of it, with the field's path."""
    found = list(_names(crd))
    for version in crd["spec"]["versions"]:
        schema = version.get("schema", {}).get("openAPIV3Schema")
        if not schema:  # [2] in v1 every version must have one
            found.append(f"spec.versions[{version.get('name')}].schema.openAPIV3Schema: Required value: schemas are required")
            continue
        found += list(_columns(version)) + schema_problems(schema)
    return found


def schema_problems(schema: Schema) -> list[str]:
    found = list(_structural(schema, "", root=True))
    return found or cost_errors(schema)


def _names(crd: dict[str, Any]) -> Iterator[str]:
    """[2] ValidateCustomResourceDefinition, ValidateCustomResourceDefinitionNames, ...Versions."""
    spec, names = crd["spec"], crd["spec"]["names"]
    if crd["metadata"].get("name") != f"{names.get('plural')}.{spec.get('group')}":
        yield f'metadata.name: Invalid value: must be spec.names.plural+"."+spec.group ({names.get("plural")}.{spec.get("group")})'
    if not DNS_SUBDOMAIN.match(spec.get("group", "")) or "." not in spec.get("group", ""):
        yield "spec.group: Invalid value: should be a domain with at least one dot"
    if spec.get("scope") not in ("Namespaced", "Cluster"):
        yield "spec.scope: Unsupported value"
    for key in ("plural", "singular"):
        if not DNS_LABEL.match(names.get(key, "")) or len(names.get(key, "")) > 63:
            yield f"spec.names.{key}: Invalid value: a DNS-1035 label"
    for key in ("kind", "listKind"):
        if not DNS_LABEL.match(names.get(key, "").lower()):
            yield f"spec.names.{key}: Invalid value: may have mixed case, but should otherwise match a DNS-1035 label"
    if names.get("kind") == names.get("listKind"):
        yield "spec.names.listKind: Invalid value: kind and listKind may not be the same"
    for key in ("shortNames", "categories"):
        for name in names.get(key, ()):
            if not DNS_LABEL.match(name):
                yield f"spec.names.{key}: Invalid value: {name}"
    versions = spec["versions"]
    if sum(bool(version.get("storage")) for version in versions) != 1:
        yield "spec.versions: Invalid value: must have exactly one version marked as storage version"
    if len({version["name"] for version in versions}) != len(versions):
        yield "spec.versions: Invalid value: must contain unique version names"
    for version in versions:
        if not VERSION.match(version["name"]):
            yield f"spec.versions[{version['name']}].name: Invalid value: a DNS-1035 label"


def _columns(version: dict[str, Any]) -> Iterator[str]:
    """[2] ValidateCustomResourceColumnDefinition."""
    for number, column in enumerate(version.get("additionalPrinterColumns", ())):
        where = f"spec.versions[{version['name']}].additionalPrinterColumns[{number}]"
        if not column.get("name"):
            yield f"{where}.name: Required value"
        if column.get("type") not in COLUMN_TYPES:
            yield f"{where}.type: Invalid value: must be one of {', '.join(sorted(COLUMN_TYPES))}"
        if not column.get("jsonPath", "").startswith("."):
            yield f"{where}.jsonPath: Invalid value: must be a simple json path starting with ."


def _structural(schema: Schema, path: str, root: bool = False) -> Iterator[str]:
    where = path or "<root>"
    for word in schema:
        if word in FORBIDDEN:  # [1] "the following are not allowed"
            yield f"{where}.{word}: Forbidden: must not be used in a structural schema"
        elif word not in KNOWN:  # strict decoding of the CRD itself
            yield f'strict decoding error: unknown field "{where}.{word}"'
    kind = schema.get("type")
    if kind is None and not schema.get(PRESERVE) and not schema.get(INT_OR_STRING):
        yield f"{where}.type: Required value: must not be empty for specified object fields"  # [3]
    if kind is not None and kind not in TYPES:
        yield f"{where}.type: Unsupported value: {kind!r}"
    if root and kind != "object":
        yield f"{where}.type: Invalid value: must be object at the root"  # [3]
    if root and "additionalProperties" in schema:
        yield f"{where}.additionalProperties: Forbidden: must not be used at the root"  # [3]
    if schema.get(PRESERVE) and schema.get(INT_OR_STRING):
        yield f"{where}.{PRESERVE}: Invalid value: must be false if {INT_OR_STRING} is true"  # [3]
    if schema.get("x-kubernetes-embedded-resource") and kind != "object":
        yield f"{where}.type: must be object if x-kubernetes-embedded-resource is true"  # [3]
    if "properties" in schema and "additionalProperties" in schema:
        yield f"{where}.additionalProperties: Forbidden: additionalProperties and properties are mutual exclusive"  # [2]
    if kind == "array" and "items" not in schema:
        yield f"{where}.items: Required value: must be specified"  # [3]
    if isinstance(schema.get("items"), list):
        yield f"{where}.items: Forbidden: items must be a schema object and not an array"  # [2]
    for bound in ("exclusiveMinimum", "exclusiveMaximum"):
        if bound in schema and not isinstance(schema[bound], bool):
            yield f"{where}.{bound}: json: cannot unmarshal number into a boolean"  # [4] as in OpenAPI 3.0
    if "pattern" in schema and not _compiles(schema["pattern"]):
        yield f"{where}.pattern: Invalid value: must be a valid regular expression"  # [3]
    for name in schema.get("required", ()):
        if "properties" in schema and name not in schema["properties"] and not schema.get(PRESERVE):
            yield f"{where}.required: {name} is not a property"  # a resource that has it would lose it: nothing could be valid
    yield from _default(schema, where)
    yield from _lists(schema, where)
    yield from _rules(schema, where)
    for quantifier in ("allOf", "anyOf", "oneOf"):
        for number, inner in enumerate(schema.get(quantifier, ())):
            yield from _value_validation(inner, f"{where}.{quantifier}[{number}]", schema.get(INT_OR_STRING, False))
    for name, inner in schema.get("properties", {}).items():
        if root and name == "metadata":
            yield from _metadata(inner, f"{path}.metadata")
            continue
        if root and name in ("apiVersion", "kind") and inner.get("type") != "string":
            yield f"{path}.{name}.type: Invalid value: must be string"  # [3]
        yield from _structural(inner, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from _structural(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _structural(schema["additionalProperties"], f"{path}{{}}")


def _metadata(schema: Schema, path: str) -> Iterator[str]:
    """[3] validateStructuralMetadataInvariants: at the root only `type` and restrictions of name and generateName."""
    if schema.get("type") != "object":
        yield f"{path}.type: Invalid value: must be object"
    if set(schema) - {"type", "properties"} or set(schema.get("properties", {})) - {"name", "generateName"}:
        yield (f"{path}: Forbidden: must not specify anything other than name and generateName, but metadata is implicitly "
               "specified")  # fmt: skip


def _value_validation(schema: Schema, where: str, int_or_string: bool) -> Iterator[str]:
    """[1] inside allOf, anyOf, oneOf and not: nothing that gives a structure; `type` only in the pattern of int-or-string."""
    words = {"description", "default", "additionalProperties", "nullable", "title", RULES, PRESERVE, LIST_TYPE, LIST_KEYS}
    if not int_or_string:
        words.add("type")
    for word in words & set(schema):
        yield f"{where}.{word}: Forbidden: must be empty to be structural"


def _default(schema: Schema, where: str) -> Iterator[str]:
    """[1] "Defaulting": a default is pruned, and must be valid as it stands, before nested defaults are filled in."""
    if schema.get("default") is None:  # a null is read as none (seen on a real server)
        return
    value = schema["default"]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # YAML's 0.0 is JSON's 0 (sigs.k8s.io/yaml)
    for name in unknown_fields(value, schema, ".default"):
        yield f"{where}.{name}: Invalid value: must not have unknown fields"
    for text in schema_errors(value, schema) + cel_errors(value, None, schema):
        yield f"{where}.default{text}" if text.startswith(".") else f"{where}.default: {text}"


def _lists(schema: Schema, where: str) -> Iterator[str]:
    """[2] validateListType..., [5]."""
    kind, keys = schema.get(LIST_TYPE), schema.get(LIST_KEYS)
    if kind is not None and kind not in ("atomic", "set", "map"):
        yield f"{where}.{LIST_TYPE}: Unsupported value: {kind!r}"
    if kind is not None and schema.get("type") != "array":
        yield f"{where}.type: Invalid value: must be array if {LIST_TYPE} is specified"
    if keys and kind != "map":
        yield f"{where}.{LIST_TYPE}: Invalid value: must be map if {LIST_KEYS} is non-empty"
    if schema.get("x-kubernetes-map-type") not in (None, "granular", "atomic"):
        yield f"{where}.x-kubernetes-map-type: Unsupported value"
    items = schema.get("items", {})
    if kind == "set" and items.get("type") in ("object", "array") and "atomic" not in (
        items.get("x-kubernetes-map-type"), items.get(LIST_TYPE)):  # fmt: skip
        yield f"{where}.items: Invalid value: items of a set are scalars or atomic"
    if kind == "set" and items.get("nullable"):
        yield f"{where}.items.nullable: Forbidden: cannot be nullable when {LIST_TYPE} is set"
    if kind != "map":
        return
    if not keys:
        yield f"{where}.{LIST_KEYS}: Required value: must not be empty if {LIST_TYPE} is map"
    if len(set(keys or ())) != len(keys or ()):
        yield f"{where}.{LIST_KEYS}: Invalid value: must not contain duplicate entries"
    if items.get("type") != "object" or items.get("nullable"):
        yield f"{where}.items: Invalid value: must be object and not nullable if parent array's {LIST_TYPE} is map"
    for key in keys or ():
        inner = items.get("properties", {}).get(key)
        if inner is None:
            yield f"{where}.{LIST_KEYS}: Invalid value: {key}: entries must all be names of item properties"
        elif inner.get("type") in ("object", "array"):
            yield f"{where}.items.properties[{key}].type: Invalid value: must be a scalar type"
        elif key not in items.get("required", ()) and "default" not in inner:
            yield f"{where}.items.properties[{key}].default: Required value: a list map key must have a default or be required"


def _rules(schema: Schema, where: str) -> Iterator[str]:
    """[1] "Validation rules", [2] validateXValidations: texts, reasons, and field paths that exist."""
    for number, rule in enumerate(schema.get(RULES, ())):
        place = f"{where}.{RULES}[{number}]"
        if set(rule) - {"rule", "message", "messageExpression", "reason", "fieldPath", "optionalOldSelf"}:
            yield f"{place}: unknown field"
        if not rule.get("rule", "").strip():
            yield f"{place}.rule: Required value: rule is not specified"
        message = rule.get("message")
        if message is not None and (not message.strip() or "\n" in message or len(message) > 2048):
            yield f"{place}.message: Invalid value: one line, not empty, at most 2048 characters"
        if "reason" in rule and rule["reason"] not in REASONS:
            yield f"{place}.reason: Unsupported value"
        if "fieldPath" in rule and not _refers(rule["fieldPath"], schema):
            yield f"{place}.fieldPath: Invalid value: {rule['fieldPath']}: does not refer to a valid field"
    # [1] "Transition rules": not inside lists whose items cannot be told apart between two versions.
    if schema.get("type") == "array" and schema.get(LIST_TYPE) != "map" and isinstance(
        schema.get("items"), dict) and _mentions_old(schema["items"]):  # fmt: skip
        yield f"{where}.items: Invalid value: oldSelf cannot be used on the uncorrelatable portion of the schema"


def _mentions_old(schema: Schema) -> bool:
    own = any(re.search(r"\boldSelf\b", rule["rule"]) for rule in schema.get(RULES, ()))
    inner = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    return own or any(_mentions_old(item) for item in inner if isinstance(item, dict))


def _refers(path: str, schema: Schema) -> bool:
    """[1] a field path is relative, begins with `.`, and leads through properties of the schema (no lists)."""
    if not path.startswith("."):
        return False
    for part in path[1:].split("."):
        schema = schema.get("properties", {}).get(part)
        if schema is None:
            return False
    return True


def _compiles(pattern: str) -> bool:
    """Go's RE2 has no look-around and no back references (github.com/google/re2/wiki/Syntax)."""
    if re.search(r"\(\?[=!<]|\\[1-9]", pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
