"""CRD validation as the API server does it: prune or refuse unknown fields, default, check types and limits, run CEL rules."""

from __future__ import annotations

import copy
import re
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


def schema_errors(value: Any, schema: Schema) -> list[str]:
    """Violations of types and limits, in the API server's style."""
    validator = VALIDATORS.get(id(schema))
    if validator is None:
        validator = VALIDATORS[id(schema)] = jsonschema.Draft4Validator(_nullable(schema))
        KEPT.append(schema)  # an id is only unique while its object lives
    errors = []
    for error in validator.iter_errors(value):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        errors.append(f"{path[1:]}: Invalid value: {error.message[:300]}")
    return sorted(errors)


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


class Cel:
    """Compiled rules, each compiled once."""

    def __init__(self) -> None:
        self._environment = celpy.Environment()
        self._programs: dict[str, Any] = {}

    def run(self, rule: str, values: dict[str, Any]) -> bool:
        if rule not in self._programs:
            self._programs[rule] = self._environment.program(self._environment.compile(rule))
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
            errors.append(f"{path[1:] or '<root>'}: Invalid value: {rule['message']}")
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


def structural_errors(schema: Schema, path: str = "") -> list[str]:
    """Why the API server would refuse the CRD itself: the rules of structural schemas that are easy to break in a generator."""
    errors = []
    if path and "type" not in schema and not schema.get(PRESERVE) and not schema.get("x-kubernetes-int-or-string"):
        errors.append(f"{path}: type is required")
    for word in (
        "$ref",
        "anyOf",
        "const",
        "prefixItems",
        "propertyNames",
        "patternProperties",
        "title",
        "definitions",
        "$defs",
    ):
        if word in schema:
            errors.append(f"{path}: {word} is not allowed")
    if schema.get("additionalProperties") is False or ("properties" in schema and "additionalProperties" in schema):
        errors.append(f"{path}: additionalProperties with properties")
    if isinstance(schema.get("exclusiveMinimum"), (int, float)) and not isinstance(schema["exclusiveMinimum"], bool):
        errors.append(f"{path}: exclusiveMinimum must be a boolean")
    if schema.get("type") == "string" and "maxLength" not in schema and "enum" not in schema and path.startswith(".spec"):
        errors.append(f"{path}: no maxLength")
    if schema.get("type") == "array" and "maxItems" not in schema:
        errors.append(f"{path}: no maxItems")
    if "additionalProperties" in schema and "maxProperties" not in schema:
        errors.append(f"{path}: no maxProperties")
    if "default" in schema:
        value = schema["default"]  # checked before nested defaults are filled in
        errors += [f"{path}: default {text}" for text in schema_errors(value, schema) + cel_errors(value, None, schema)]
    for key, inner in schema.get("properties", {}).items():
        errors += structural_errors(inner, f"{path}.{key}")
    if "items" in schema:
        errors += structural_errors(schema["items"], f"{path}[]")
        if schema.get("x-kubernetes-list-type") == "atomic" and "oldSelf" in str(schema["items"]):
            errors.append(f"{path}: transition rule inside an atomic list")
    if isinstance(schema.get("additionalProperties"), dict):
        errors += structural_errors(schema["additionalProperties"], f"{path}{{}}")
    return errors
