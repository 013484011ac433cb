"""What a CEL rule may cost at worst, by the schema it stands in: the API server refuses a CRD whose rules could cost too much.

Rules copied (each cited by its source file):
- costs of identifiers, selections, calls and comprehensions, and how macros expand: google/cel-go `checker/cost.go`, `parser/macro.go`;
- sizes of strings (4 bytes a character of maxLength, else a whole request), lists and maps: kubernetes
  `staging/src/k8s.io/apiserver/pkg/cel/common/schemas.go`; keys of maps count as nothing (`.../schema/cel/compilation.go`, EstimateSize:
  their type has no MaxElements), seen so on a real server;
- a rule runs once for every item of each list and map around it: `.../apiextensions/validation/validation.go` (CELSchemaContext);
  where one of them has no bound, as often as the least such value fits into a request (`.../schema/cel/compilation.go`,
  maxCardinality);
- the limits: `StaticEstimatedCostLimit` 10,000,000 for a rule and `StaticEstimatedCRDCostLimit` 100,000,000 for all, the same file
  (kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions, "Resource use by validation functions").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import celpy
from lark import Token, Tree

Schema = dict[str, Any]
RULE_LIMIT, CRD_LIMIT = 10_000_000, 100_000_000
REQUEST_BYTES = 3 * 1024 * 1024
UNBOUNDED = 2**63 - 1
TRAVERSAL, REGEX = 0.1, 0.25
MACROS = {"all": 3, "exists": 4, "exists_one": 2, "map": 12, "filter": 13}  # cost of an iteration beside its predicate
STRING: Schema = {"type": "string"}
METADATA = {"type": "object", "properties": {"name": STRING, "generateName": STRING}}
IDENTITY = {"apiVersion": STRING, "kind": STRING, "metadata": METADATA}


class CompileError(ValueError):
    """The rule does not compile against its schema: an unknown field, variable or function."""


@dataclass(frozen=True)
class Value:
    cost: int
    kind: str  # string, list, map, object, integer, number, boolean, null, dyn
    size: int = 1
    schema: Schema | None = None


def of_schema(schema: Schema, cost: int = 0) -> Value:
    kind = schema.get("type", "dyn")
    if kind == "array":
        return Value(cost, "list", schema.get("maxItems", (REQUEST_BYTES - 2) // (least_bytes(schema["items"]) + 1)), schema)
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        most = (REQUEST_BYTES - 2) // (least_bytes(schema["additionalProperties"]) + 6)
        return Value(cost, "map", schema.get("maxProperties", most), schema)
    if kind == "string":
        longest = max((len(text) for text in schema.get("enum", ()) if isinstance(text, str)), default=REQUEST_BYTES - 2)
        return Value(cost, "string", schema["maxLength"] * 4 if "maxLength" in schema else longest, schema)
    return Value(cost, kind, 1, schema)


def least_bytes(schema: Schema) -> int:
    """The least bytes of a value in JSON."""
    if schema.get("type") != "object" or "properties" not in schema:
        return {"string": 2, "array": 2, "object": 2, "boolean": 4}.get(schema.get("type", ""), 1)
    needed = [name for name in schema.get("required", ()) if "default" not in schema["properties"].get(name, {})]
    return 2 + sum(len(name) + least_bytes(schema["properties"][name]) + 4 for name in needed)


def costs(schema: Schema) -> Iterator[tuple[str, str, int]]:
    """Path, rule and worst cost (with its number of runs) of every rule of a CRD's root schema."""
    root = {**schema, "properties": {**schema.get("properties", {}), **IDENTITY}}
    yield from _walk(root, "", 1)


def _walk(schema: Schema, path: str, runs: int | None) -> Iterator[tuple[str, str, int]]:
    """`runs` is None below a list or map without a bound."""
    for rule in schema.get("x-kubernetes-validations", ()):
        times = REQUEST_BYTES // (least_bytes(schema) + 1) if runs is None else runs
        yield path, rule["rule"], estimate(rule["rule"], schema) * times
    for name, inner in schema.get("properties", {}).items():
        yield from _walk(inner, f"{path}.{name}", runs)
    if "items" in schema:
        yield from _walk(schema["items"], f"{path}[]", _times(runs, schema.get("maxItems")))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _walk(schema["additionalProperties"], f"{path}{{}}", _times(runs, schema.get("maxProperties")))


def _times(runs: int | None, most: int | None) -> int | None:
    return None if runs is None or most is None else min(runs * most, UNBOUNDED)


ENVIRONMENT = celpy.Environment()
# Strings that are not raw know these escapes only (cel-spec doc/langdef.md, "String and Bytes Values"); celpy takes any.
LITERAL = re.compile(r"""(?<![rR])(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
ESCAPE = re.compile(r"""\\(?![abfnrtv\\?"'`]|[xX][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-3][0-7]{2}).""")


def estimate(rule: str, schema: Schema) -> int:
    """The worst cost of one run of a rule on a value of this schema. CompileError where it names what is not there."""
    if wrong := next(filter(None, map(ESCAPE.search, LITERAL.findall(rule))), None):
        raise CompileError(f"{rule}: Syntax error: token recognition error at: {wrong[0]}")
    try:
        tree = ENVIRONMENT.compile(rule)
    except celpy.CELParseError as error:
        raise CompileError(f"{rule}: {error}") from error
    found = _Estimator({"self": of_schema(schema), "oldSelf": of_schema(schema)}).value(tree)
    if found.kind not in ("boolean", "dyn"):
        raise CompileError(f"{rule}: cel expression must evaluate to a bool, not {found.kind}")
    return found.cost


class _Estimator:
    def __init__(self, variables: dict[str, Value]) -> None:
        self.variables = variables

    def value(self, node: Tree | Token) -> Value:
        while isinstance(node, Tree) and len(node.children) == 1 and node.data not in SINGLE:
            node = node.children[0]
        assert isinstance(node, Tree), node
        return getattr(self, "_" + node.data)(node.children)

    def _two(self, children: list[Any]) -> Value:
        left, right = self.value(children[0]), self.value(children[1])
        return Value(left.cost + right.cost, "boolean")

    _conditionalor = _conditionaland = _two

    def _expr(self, children: list[Any]) -> Value:
        test, yes, no = (self.value(child) for child in children)
        return Value(test.cost + max(yes.cost, no.cost), yes.kind, max(yes.size, no.size), yes.schema)

    def _relation(self, children: list[Any]) -> Value:
        operator, right = children[0].data, self.value(children[1])
        left = self.value(children[0].children[0])
        cost = left.cost + right.cost
        if operator == "relation_in":
            return Value(cost + (right.size if right.kind == "list" else 1), "boolean")
        if "string" in (left.kind, right.kind) or operator in ("relation_eq", "relation_ne"):
            return Value(cost + math.ceil(min(left.size, right.size) * TRAVERSAL), "boolean")
        return Value(cost + 1, "boolean")

    def _arithmetic(self, children: list[Any]) -> Value:
        left, right = self.value(children[0].children[0]), self.value(children[1])
        cost = left.cost + right.cost
        if left.kind in ("string", "list"):
            size = left.size + right.size
            return Value(cost + (math.ceil(size * TRAVERSAL) if left.kind == "string" else 1), left.kind, size, left.schema)
        return Value(cost + 1, left.kind)

    _addition = _multiplication = _arithmetic

    def _unary(self, children: list[Any]) -> Value:
        inner = self.value(children[1])
        return Value(inner.cost + 1, inner.kind)

    def _paren_expr(self, children: list[Any]) -> Value:
        return self.value(children[0])

    def _literal(self, children: list[Any]) -> Value:
        token = children[0]
        if "STRING" in token.type:
            return Value(0, "string", len(str(token).strip("r'\"").encode()))
        kinds = {"BOOL_LIT": "boolean", "NULL_LIT": "null", "FLOAT_LIT": "number"}
        return Value(0, kinds.get(token.type, "integer"))

    def _ident(self, children: list[Any]) -> Value:
        name = str(children[0])
        if name not in self.variables:
            raise CompileError(f"undeclared reference to '{name}'")
        found = self.variables[name]
        return Value(1, found.kind, found.size, found.schema)

    def _list_lit(self, children: list[Any]) -> Value:
        items = [self.value(child) for child in children[0].children] if children else []
        size = max((item.size for item in items), default=0)
        item: Schema = {"type": items[0].kind} if items else {}
        if item.get("type") == "string":
            item["maxLength"] = math.ceil(size / 4)
        return Value(10 + sum(item.cost for item in items), "list", len(items), {"type": "array", "items": item})

    def _member_dot(self, children: list[Any]) -> Value:
        target, name = self.value(children[0]), str(children[1])
        if target.kind == "map":
            inner = target.schema["additionalProperties"] if target.schema else {}
        elif target.kind == "object" and target.schema is not None:
            inner = target.schema.get("properties", {}).get(unescape(name))
            if inner is None:
                raise CompileError(f"undefined field '{name}'")
        else:
            raise CompileError(f"type '{target.kind}' does not support field selection ('{name}')")
        if inner.get("type") is None and not inner.get("x-kubernetes-int-or-string"):
            raise CompileError(f"undefined field '{name}'")  # a value without a type is not exposed to rules
        return of_schema(inner, target.cost + 1)

    def _member_index(self, children: list[Any]) -> Value:
        target, index = self.value(children[0]), self.value(children[1])
        inner = (target.schema or {}).get("items" if target.kind == "list" else "additionalProperties", {})
        return of_schema(inner, target.cost + index.cost + 1)

    def _ident_arg(self, children: list[Any]) -> Value:
        name, arguments = str(children[0]), self._arguments(children[1:])
        if name == "has":
            return Value(self.value(arguments[0]).cost, "boolean")
        if name == "quantity":  # staging/src/k8s.io/apiserver/pkg/cel/library/cost.go
            text = self.value(arguments[0])
            return Value(text.cost + math.ceil(text.size * TRAVERSAL), "quantity")
        if name not in ("size", "int", "double", "string"):
            raise CompileError(f"undeclared reference to '{name}'")
        return Value(self.value(arguments[0]).cost + 1, {"double": "number", "string": "string"}.get(name, "integer"))

    def _member_dot_arg(self, children: list[Any]) -> Value:
        target, name, arguments = self.value(children[0]), str(children[1]), self._arguments(children[2:])
        if name in MACROS:
            return self._macro(target, name, arguments)
        if name == "size":
            return Value(target.cost + 1, "integer")
        if name == "compareTo" and target.kind == "quantity":
            return Value(target.cost + self.value(arguments[0]).cost + 1, "integer")
        if target.kind != "string":
            raise CompileError(f"found no matching overload for '{name}' on {target.kind}")
        given = [self.value(argument) for argument in arguments]
        cost = target.cost + sum(value.cost for value in given)
        if name in ("startsWith", "endsWith"):
            return Value(cost + math.ceil(given[0].size * TRAVERSAL), "boolean")
        if name == "contains":
            return Value(cost + math.ceil(target.size * TRAVERSAL) * math.ceil(given[0].size * TRAVERSAL), "boolean")
        if name == "matches":
            return Value(cost + math.ceil((target.size + 1) * TRAVERSAL) * math.ceil(given[0].size * REGEX), "boolean")
        raise CompileError(f"undeclared reference to '{name}'")

    def _macro(self, target: Value, name: str, arguments: list[Any]) -> Value:
        if target.kind not in ("list", "map"):
            raise CompileError(f"expression of type '{target.kind}' cannot be the range of a comprehension")
        variable = arguments[0]
        while isinstance(variable, Tree):
            variable = variable.children[0]
        schema = target.schema or {}
        key = Value(0, "string", 0)
        item = of_schema(schema.get("items", {})) if target.kind == "list" else key
        inner = _Estimator({**self.variables, str(variable): item}).value(arguments[1])
        around = {"exists_one": 2, "map": 11, "filter": 11}.get(name, 1)
        cost = target.cost + min(target.size * (inner.cost + MACROS[name]), UNBOUNDED) + around
        if name == "map":
            return Value(cost, "list", target.size, {"type": "array", "items": inner.schema or {"type": inner.kind}})
        if name == "filter":
            items = schema.get("items", STRING)
            return Value(cost, "list", target.size, {"type": "array", "maxItems": target.size, "items": items})
        return Value(cost, "boolean")

    def _arguments(self, children: list[Any]) -> list[Any]:
        return list(children[0].children) if children else []


SINGLE = ("literal", "ident", "list_lit", "paren_expr", "member_dot_arg", "ident_arg", "exprlist")


def unescape(name: str) -> str:
    """Words that CEL reserves, and `.`, `-`, `/` in property names, are written escaped (custom-resource-definitions, "Escaping")."""
    if name.startswith("__") and name.endswith("__") and "__" not in name[2:-2]:
        return name[2:-2]
    return name.replace("__dot__", ".").replace("__dash__", "-").replace("__slash__", "/").replace("__underscores__", "__")


def cost_errors(schema: Schema) -> list[str]:
    """Why the API server would refuse the CRD for its rules."""
    total, errors = 0, []
    try:
        for path, rule, cost in costs(schema):
            total += cost
            if cost > RULE_LIMIT:
                errors.append(f"{path}: estimated rule cost exceeds budget by factor of {cost / RULE_LIMIT:.1f}x ({rule})")
    except CompileError as error:
        return [f"compilation failed: {error}"]
    if total > CRD_LIMIT:
        errors.append(f"estimated cost of all rules exceeds budget by factor of {total / CRD_LIMIT:.1f}x")
    return errors
