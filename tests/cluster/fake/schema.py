"""CRD validation as the API server does it: prune or refuse unknown fields, default, check types and limits, run CEL rules."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import celpy
import jsonschema
from celpy import celtypes

Schema = dict[str, Any]
VALIDATORS: dict[int, Any] = {}
KEPT: list[Schema] = []
PRESERVE = "x-kubernetes-preserve-unknown-fields"


def unknown_fields(value: Any, schema: Schema, path: str = "") -> list[str]:
    """Fields that the schema does not name (kubectl's strict validation refuses them, the API server alone prunes them)."""
    if schema.get(PRESERVE) or value is None:
        return []
    found: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            if key in schema.get("properties", {}):
                found += unknown_fields(item, schema["properties"][key], f"{path}.{key}")
            elif "additionalProperties" in schema:
                found += unknown_fields(item, schema["additionalProperties"], f"{path}.{key}")
            elif path not in ("", ".metadata") and "properties" in schema:
                found.append(f"{path}.{key}"[1:])
    elif isinstance(value, list):
        for number, item in enumerate(value):
            found += unknown_fields(item, schema.get("items", {}), f"{path}[{number}]")
    return found


def prepare(value: Any, schema: Schema) -> Any:
    """A copy with nulls and unknown fields pruned and defaults filled in."""
    if isinstance(value, dict):
        if "properties" not in schema and "additionalProperties" not in schema:
            return copy.deepcopy(value)
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        result = {}
        for key, item in value.items():
            inner = properties.get(key, rest)
            if inner is None and not schema.get(PRESERVE):
                continue
            if item is None and not (inner or {}).get("nullable"):
                continue
            result[key] = prepare(item, inner or {})
        for key, inner in properties.items():
            if key not in result and "default" in inner:
                result[key] = prepare(inner["default"], inner)
        return result
    if isinstance(value, list):
        return [prepare(item, schema.get("items", {})) for item in value]
    return value


def duplicates(value: Any, schema: Schema, path: str = "") -> list[str]:
    """Items of one key in a list of type map (kubernetes.io/docs/reference/using-api/server-side-apply, "Merge strategy")."""
    found: list[str] = []
    if isinstance(value, dict):
        for key, item in value.items():
            found += duplicates(item, schema.get("properties", {}).get(key) or schema.get("additionalProperties") or {}, f"{path}.{key}")
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys") if schema.get("x-kubernetes-list-type") == "map" else None
        seen = []
        for number, item in enumerate(value):
            found += duplicates(item, schema.get("items", {}), f"{path}[{number}]")
            identity = [item.get(key) for key in keys] if keys else None
            if identity is not None and identity in seen:
                found.append(f"{path[1:]}[{number}]: Duplicate value: {dict(zip(keys or (), identity))}")
            seen.append(identity)
    return found


def schema_errors(value: Any, schema: Schema) -> list[str]:
    """Violations of types and limits, in the API server's style."""
    validator = VALIDATORS.get(id(schema))
    if validator is None:
        validator = VALIDATORS[id(schema)] = Validator(_nullable(schema))
        KEPT.append(schema)  # an id is only unique while its object lives
    errors = []
    for error in validator.iter_errors(value):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        errors.append(in_its_words(path[1:], error))
    return sorted(errors)


def in_its_words(path: str, error: jsonschema.ValidationError) -> str:
    """As kube-openapi's validation and apimachinery's field errors say it; seen on Kubernetes 1.36."""
    value, wanted, quoted = error.instance, error.validator_value, json.dumps(error.instance)
    exclusive = error.schema.get("exclusiveMinimum" if error.validator == "minimum" else "exclusiveMaximum")
    equal = "" if exclusive else " or equal to"
    match error.validator:
        case "maxLength":
            return f"{path}: Too long: may not be more than {wanted} bytes"
        case "maxItems" | "maxProperties":
            return f"{path}: Too many: {len(value)}: must have at most {wanted} items"
        case "minItems" | "minProperties":
            return f"{path}: Invalid value: {len(value)}: {path} in body should have at least {wanted} {error.validator[3:].lower()}"
        case "minLength":
            return f"{path}: Invalid value: {quoted}: {path} in body should be at least {wanted} chars long"
        case "enum":
            return f"{path}: Unsupported value: {quoted}: supported values: {', '.join(json.dumps(item) for item in wanted)}"
        case "pattern":
            return f"{path}: Invalid value: {quoted}: {path} in body should match '{wanted}'"
        case "minimum" | "maximum":
            side = "greater" if error.validator == "minimum" else "less"
            return f"{path}: Invalid value: {quoted}: {path} in body should be {side} than{equal} {wanted}"
        case "required":
            missing = re.search(r"'(.*)' is a required property", error.message)
            return f"{path}.{missing[1] if missing else ''}: Required value".lstrip(".")
        case "type":
            names = {bool: "boolean", int: "integer", float: "float64", str: "string", list: "array", dict: "object", type(None): "null"}
            given = names[type(value)]
            kind = "int64" if wanted == "integer" and given in ("integer", "float64") else wanted
            return f'{path}: Invalid value: "{given}": {path} in body must be of type {kind}: "{given}"'
    return f"{path}: Invalid value: {error.message[:300]}"


def _pattern(validator: Any, pattern: str, value: Any, schema: Schema) -> Iterator[jsonschema.ValidationError]:
    """RE2, where `$` is the very end: Python's would let a newline follow."""
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _bound(side: str) -> Any:
    """A whole number is compared with the whole part of the bound (kube-openapi pkg/validation/validate/values.go,
    MaximumNativeType): 0 is not below an exclusive 0.5. Seen on a real server."""

    def check(validator: Any, bound: float, value: Any, schema: Schema) -> Iterator[jsonschema.ValidationError]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        limit = int(bound) if isinstance(value, int) else bound
        beyond = value < limit if side == "minimum" else value > limit
        if beyond or (value == limit and schema.get(f"exclusive{side.capitalize()}")):
            yield jsonschema.ValidationError(f"{value} breaks the {side} {bound}")

    return check


def _is_integer(checker: Any, value: Any) -> bool:
    """64 bits: a longer number is read as a float (apimachinery pkg/util/json)."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


Validator = jsonschema.validators.extend(
    jsonschema.Draft4Validator,
    {"pattern": _pattern, "minimum": _bound("minimum"), "maximum": _bound("maximum")},
    type_checker=jsonschema.Draft4Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


def _nullable(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _nullable(item) for key, item in schema.items() if key != "default"}
    if result.get("nullable") is True and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


# ---------------------------------------------------------------- CEL


SUFFIXES = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30,
            "Ti": 2.0**40, "Pi": 2.0**50}  # fmt: skip


def quantity(text: celtypes.StringType) -> celtypes.DoubleType:
    """Kubernetes' CEL function of that name (kubernetes.io/docs/reference/using-api/cel, "Kubernetes quantity library")."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", str(text))
    if found is None or found[2] not in SUFFIXES:
        raise ValueError(f"{text} is no quantity")
    return celtypes.DoubleType(float(found[1]) * SUFFIXES[found[2]])


def compare_to(left: celtypes.DoubleType, right: celtypes.DoubleType) -> celtypes.IntType:
    return celtypes.IntType((left > right) - (left < right))


FUNCTIONS = {"quantity": quantity, "compareTo": compare_to}


class Cel:
    """Compiled rules, each compiled once."""

    def __init__(self) -> None:
        self._environment = celpy.Environment()
        self._programs: dict[str, Any] = {}

    def run(self, rule: str, values: dict[str, Any]) -> bool:
        if rule not in self._programs:
            self._programs[rule] = self._environment.program(self._environment.compile(rule), functions=FUNCTIONS)
        return bool(self._programs[rule].evaluate(values))


CEL = Cel()


def to_cel(value: Any, schema: Schema) -> Any:
    """A value with the types that its schema gives it: 1 is a double where the schema says number."""
    if isinstance(value, bool):
        return celtypes.BoolType(value)
    if isinstance(value, (int, float)):
        whole = schema.get("type") == "integer" or (schema.get("type") is None and isinstance(value, int))
        return celtypes.IntType(int(value)) if whole else celtypes.DoubleType(value)
    if isinstance(value, str):
        return celtypes.StringType(value)
    if isinstance(value, list):
        return celtypes.ListType([to_cel(item, schema.get("items", {})) for item in value])
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
        return celtypes.MapType({celtypes.StringType(key): to_cel(item, properties.get(key, rest)) for key, item in value.items()})
    return None


def cel_errors(value: Any, old: Any, schema: Schema, path: str = "") -> list[str]:
    """Violated rules. Transition rules run where there is an old value; items of atomic lists have none."""
    errors: list[str] = []
    for rule in schema.get("x-kubernetes-validations", ()):
        transition = re.search(r"\boldSelf\b", rule["rule"]) is not None
        if transition and old is None:
            continue
        values = {"self": to_cel(value, schema)} | ({"oldSelf": to_cel(old, schema)} if transition else {})
        if not CEL.run(rule["rule"], values):
            where = (path + rule.get("fieldPath", ""))[1:]  # without a path the root is `<nil>`
            errors.append(f"{where or '<nil>'}: Invalid value: {rule['message']}")
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties")
        before = old if isinstance(old, dict) else {}
        for key, item in value.items():
            inner = properties.get(key, rest)
            if inner:
                errors += cel_errors(item, before.get(key), inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            errors += cel_errors(item, None, schema.get("items", {}), f"{path}[{number}]")
    return errors
