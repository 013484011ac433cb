"""The fake API server refuses a wrong CustomResourceDefinition as the real one does: one wrong thing at a time in a right one."""

from __future__ import annotations

import copy
import re

import pytest
from fake.cel_cost import CompileError, estimate
from fake.crd_rules import errors
from fake.store import Store, install_crd

from terrace.cluster.api import Refused

RULES, LIST, KEYS = "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"


def root(crd):
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def spec(crd):
    return root(crd)["properties"]["spec"]["properties"]


def names(crd):
    return crd["spec"]["names"]


def version(crd):
    return crd["spec"]["versions"][0]


def field(**schema):
    """Adds one field to the spec."""
    return lambda crd: spec(crd).update(added=schema)


def rule(text, **more):
    return field(type="object", properties={"a": {"type": "string"}}, **{RULES: [{"rule": text, "message": "m"} | more]})


def keyed(**items):
    return {"type": "array", LIST: "map", KEYS: ["name"], "items": {
        "type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}} | items}  # fmt: skip


WRONG = {
    # root
    "description under metadata": (lambda c: root(c)["properties"]["metadata"].update(description="x"), "must not specify anything"),
    "labels under metadata": (
        lambda c: root(c)["properties"]["metadata"].update(properties={"labels": {"type": "object"}}), "must not specify anything"),
    "metadata of another type": (lambda c: root(c)["properties"]["metadata"].update(type="string"), "must be object"),
    "kind of another type": (lambda c: root(c)["properties"]["kind"].update(type="integer"), "must be string"),
    "root that is no object": (lambda c: root(c).update(type="array"), "must be object at the root"),
    "root with additional properties": (lambda c: root(c).update(additionalProperties={"type": "string"}), "at the root"),
    # names
    "name that is not plural.group": (lambda c: c["metadata"].update(name="curriculums.terrace.dev"), "must be spec.names.plural"),
    "group without a dot": (lambda c: c["spec"].update(group="terrace"), "at least one dot"),
    "plural in upper case": (lambda c: names(c).update(plural="Curricula"), "DNS-1035"),
    "kind with a dash at its end": (lambda c: names(c).update(kind="Curriculum-"), "DNS-1035"),
    "list kind that is the kind": (lambda c: names(c).update(listKind="Curriculum"), "may not be the same"),
    "short name with a blank": (lambda c: names(c).update(shortNames=["a b"]), "shortNames"),
    "two storage versions": (
        lambda c: c["spec"]["versions"].append({**version(c), "name": "v1beta1"}), "exactly one version marked as storage"),
    "version without a schema": (lambda c: version(c).pop("schema"), "schemas are required"),
    "column of an unknown type": (lambda c: version(c)["additionalPrinterColumns"][0].update(type="float"), "must be one of"),
    "column without a path": (lambda c: version(c)["additionalPrinterColumns"][0].update(jsonPath="status"), "json path"),
    # structure
    "field without a type": (field(description="x"), "must not be empty for specified object fields"),
    "type that is none": (field(type="float"), "Unsupported value"),
    "list without items": (field(type="array"), "must be specified"),
    "list of several item schemas": (field(type="array", items=[{"type": "string"}]), "not an array"),
    "reference": (field(**{"type": "object", "$ref": "#/x"}), "must not be used"),
    "unique items": (field(type="array", items={"type": "string"}, uniqueItems=True), "must not be used"),
    "pattern properties": (field(type="object", patternProperties={"a": {"type": "string"}}), "must not be used"),
    "word of a newer JSON schema": (field(type="string", const="x"), "unknown field"),
    "additional properties beside properties": (
        field(type="object", properties={"a": {"type": "string"}}, additionalProperties={"type": "string"}), "mutual exclusive"),
    "number as exclusive bound": (field(type="number", exclusiveMinimum=0.5), "unmarshal number into a boolean"),
    "type inside anyOf": (field(type="string", anyOf=[{"type": "string"}]), "must be empty to be structural"),
    "default inside oneOf": (field(type="string", oneOf=[{"default": "x"}]), "must be empty to be structural"),
    "pattern with a look-ahead": (field(type="string", pattern="^(?!x)"), "valid regular expression"),
    "int-or-string that keeps unknown fields": (
        field(**{"x-kubernetes-int-or-string": True, "x-kubernetes-preserve-unknown-fields": True}), "must be false if"),
    # defaults
    "default of another type": (field(type="integer", default="x"), "default"),
    "default below the minimum": (field(type="integer", minimum=3, default=2), "default"),
    "default at an exclusive bound with a fraction": (
        field(type="number", maximum=0.5, exclusiveMaximum=True, default=0), "should be less than 0"),
    "default with an unknown field": (
        field(type="object", properties={"a": {"type": "string"}}, default={"b": "x"}), "must not have unknown fields"),
    "default that breaks a rule": (
        field(type="integer", default=2, **{RULES: [{"rule": "self > 2", "message": "more than 2"}]}), "more than 2"),
    # list types
    "list type of a map": (field(**{"type": "object", LIST: "atomic"}), "must be array if"),
    "unknown list type": (field(**{"type": "array", "items": {"type": "string"}, LIST: "bag"}), "Unsupported value"),
    "map list without keys": (field(**{k: v for k, v in keyed().items() if k != KEYS}), "must not be empty if"),
    "keys without a map list": (field(**{**keyed(), LIST: "atomic"}), "must be map if"),
    "key that is no property": (field(**{**keyed(), KEYS: ["id"]}), "names of item properties"),
    "key given twice": (field(**{**keyed(), KEYS: ["name", "name"]}), "duplicate entries"),
    "key that is optional": (field(**keyed(required=[])), "must have a default or be required"),
    "key that is an object": (
        field(**keyed(properties={"name": {"type": "object", "properties": {"a": {"type": "string"}}}})), "scalar type"),
    "items of a map list that are text": (field(**{**keyed(), "items": {"type": "string"}}), "must be object"),
    "set of objects": (field(**{"type": "array", LIST: "set", "items": {"type": "object"}}), "scalars or atomic"),
    # rules
    "rule that is empty": (rule(" "), "rule is not specified"),
    "message of two lines": (rule("true", message="a\nb"), "one line"),
    "reason of no kind": (rule("true", reason="Because"), "Unsupported value"),
    "field path to nowhere": (rule("true", fieldPath=".b"), "does not refer to a valid field"),
    "field path that is not relative": (rule("true", fieldPath="a"), "does not refer to a valid field"),
    "field path of the metadata's name": (
        lambda c: root(c)[RULES][0].update(fieldPath=".metadata.name"), "does not refer to a valid field"),
    "rule with a misspelt field": (rule("self.b == 'x'"), "undefined field 'b'"),
    "rule with an unknown variable": (rule("that.a == 'x'"), "undeclared reference"),
    "rule with an unknown function": (rule("self.a.reverse() == 'x'"), "undeclared reference"),
    "rule that is no bool": (rule("self.a"), "must evaluate to a bool"),
    "rule with a typing error": (rule("self.a.all(x, x == 'a')"), "cannot be the range"),
    "rule with an escape that CEL has not": (rule(r"self.a.matches('^a\.b$')"), "token recognition error"),
    "rule of broken syntax": (rule("self.a =="), "compilation failed"),
    "transition rule in an atomic list": (
        field(**{"type": "array", LIST: "atomic", "maxItems": 3, "items": {
            "type": "string", RULES: [{"rule": "self == oldSelf", "message": "m"}]}}), "uncorrelatable"),
    # cost
    "rule over an unbounded list": (
        field(type="array", items={"type": "string"}, **{RULES: [{"rule": "self.all(x, self.exists(y, x == y))", "message": "m"}]}),
        "exceeds budget"),
    "rule over strings without a length": (
        field(type="array", maxItems=64, items={"type": "string"}, **{RULES: [
            {"rule": "self.all(x, x.matches('^[a-z]+$'))", "message": "m"}]}), "exceeds budget"),
    "rule in lists in lists without bounds": (
        field(type="array", items={"type": "array", "items": {"type": "string", "maxLength": 99, RULES: [
            {"rule": "self.matches('^[a-z]+[a-z]+[a-z]+$')", "message": "m"}]}}), "exceeds budget"),
    "all rules together": (
        lambda c: [spec(c).update({f"added{n}": {"type": "array", "maxItems": 1200, "items": {"type": "string", "maxLength": 4}, RULES: [
            {"rule": "self.all(x, self.exists(y, y == x))", "message": "m"}]}}) for n in range(12)], "all rules exceeds budget"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_crd_is_refused(crd, what):
    change, expected = WRONG[what]
    wrong = copy.deepcopy(crd)
    change(wrong)
    found = "; ".join(errors(wrong))
    assert re.search(re.escape(expected), found), found or "accepted"
    with pytest.raises(Refused, match="is invalid"):
        install_crd(Store(), wrong)


def test_right_crds_are_accepted(crd):
    changes = [
        lambda c: None,
        field(**keyed()), field(**{"x-kubernetes-int-or-string": True}),
        field(**{"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}),
        field(type="string", anyOf=[{"minLength": 3}, {"pattern": "^x"}]), field(type="integer", minimum=0, exclusiveMinimum=True),
        field(type="string", nullable=True, default=None), field(type="string", default=None),
        field(type="object", additionalProperties=False),
        field(type="object", maxProperties=4, additionalProperties={"type": "string", "maxLength": 4}, **{RULES: [
            {"rule": "self.all(k, k.matches('^[a-z]+$'))", "message": "m"}]}),
        field(type="array", items={"type": "array", "items": {"type": "string", "maxLength": 9, RULES: [
            {"rule": "self != ''", "message": "m"}]}}), rule("has(self.a) || true", fieldPath=".a", reason="FieldValueInvalid"),
        lambda c: root(c)["properties"]["metadata"].update(properties={"name": {"type": "string", "maxLength": 30}}),
    ]  # fmt: skip
    for change in changes:
        right = copy.deepcopy(crd)
        change(right)
        assert errors(right) == []


def test_cost_follows_bounds():
    """The numbers are those of the estimator's rules: 4 bytes a character, a tenth for each that is looked at."""
    text = {"type": "string", "maxLength": 100}
    assert estimate("self == 'abcd'", text) == 1 + 1  # the shorter of the two
    assert estimate("self.startsWith('abcd')", text) == 1 + 1
    assert estimate("self.matches('abcd')", text) == 1 + 41  # (400 + 1) / 10 characters times a quarter of the pattern's
    items = {"type": "array", "maxItems": 10, "items": text}
    assert estimate("self.all(x, x == 'abcd')", items) == 1 + 10 * (2 + 3) + 1
    assert estimate("self.all(x, self.exists(y, x == y))", items) == 1 + 10 * (1 + 10 * (1 + 1 + 40 + 4) + 1 + 3) + 1
    with pytest.raises(CompileError):
        estimate("self.size", text)
