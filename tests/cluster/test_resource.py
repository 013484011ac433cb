"""The kind Curriculum: the committed YAML is the generated one, every field is described, wrong specs are refused in words."""

from __future__ import annotations

import copy
import json
import re

import pytest
from cluster_world import ROOT, Bench, tiny_curriculum, tiny_stage
from fake.cel_cost import costs
from fake.crd_rules import errors

from terrace.cluster.api import Refused
from terrace.cluster.crd import build_crd, crd_yaml


def test_committed_crd_is_the_generated_one():
    committed = (ROOT / "k8s/crds/curricula.yaml").read_text()
    assert committed == crd_yaml(), "run `python -m terrace.cluster.crd` and commit k8s/crds/curricula.yaml"


def test_crd_is_what_the_api_server_accepts_and_bounded(crd):
    assert errors(crd) == []
    unbounded = []

    def walk(schema, path):
        if schema.get("type") == "string" and not {"maxLength", "enum"} & set(schema) and path.startswith(".spec"):
            unbounded.append(path)
        if schema.get("type") == "array" and "maxItems" not in schema:
            unbounded.append(path)
        if "additionalProperties" in schema and "maxProperties" not in schema:
            unbounded.append(path)
        for name, inner in schema.get("properties", {}).items():
            walk(inner, f"{path}.{name}")
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                walk(schema[key], f"{path}[]")

    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    walk(schema, "")
    assert unbounded == []
    assert sum(cost for _, _, cost in costs(schema)) < 20_000_000  # a fifth of what a CRD may cost
    copy = json.dumps(crd, separators=(",", ":"))  # that `kubectl apply` keeps in an annotation; all of them may have 262,144 bytes
    assert len(copy) < 200_000


def test_every_field_is_described(crd):
    missing = []

    def walk(schema, path):
        for name, inner in schema.get("properties", {}).items():
            if not inner.get("description") and f"{path}.{name}" != ".metadata":  # the API server allows none there
                missing.append(f"{path}.{name}")
            walk(inner, f"{path}.{name}")
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                walk(schema[key], path)

    walk(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "")
    assert missing == []


def test_crd_follows_a_change_of_the_models(monkeypatch):
    """The generator reads the models: a field added there is a field here."""
    from pydantic import Field

    from terrace.cluster import crd as module
    from terrace.cluster.cluster_schema import CurriculumSpec as Original

    class CurriculumSpec(Original):
        added_field: int = Field(3, ge=1, description="Added.")

    monkeypatch.setattr(module, "CurriculumSpec", CurriculumSpec)
    spec = build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert spec["properties"]["addedField"] == {
        "type": "integer", "format": "int64", "minimum": 1, "default": 3, "description": "Added."}  # fmt: skip


def _recipe(body):
    return body["spec"]["recipe"]


def _stage(body, index=0):
    return _recipe(body)["stages"][index]


WRONG = {
    "unknown key": (lambda b: _stage(b).update(learning_rat=1), "unknown field"),
    "unknown cluster key": (lambda b: b["spec"].update(queueName="x"), "unknown field"),
    "no image": (lambda b: b["spec"]["runtime"].pop("image"), "runtime.image: Required value"),
    "no stages": (lambda b: _recipe(b).update(stages=[]), "stages: .*at least 1 items"),
    "name with a dot": (lambda b: b["metadata"].update(name="a.b"), "begins with a letter and holds only"),
    "name too long": (lambda b: b["metadata"].update(name="n" * 31), "at most 30 characters"),
    "two stages of one name": (lambda b: _stage(b, 1).update(name="warmup"), "stage names must be unique"),
    "unknown source": (lambda b: _stage(b).update(mixture={"weights": {"captoins": 1}}), "must be one of data.sources"),
    "no part trains": (lambda b: _stage(b).update(train={}), "at least one part must train"),
    "two budgets": (lambda b: _stage(b).update(budget={"steps": 1, "tokens": 1e9}), "exactly one of steps, tokens, samples, epochs"),
    "no budget": (lambda b: _stage(b).update(budget={}), "exactly one of steps, tokens, samples, epochs"),
    "negative steps": (lambda b: _stage(b).update(budget={"steps": -4}), "budget.steps: Invalid value"),
    "learning rate as text": (lambda b: _stage(b).update(train={"vision": {"lr": "1e-4"}}), "must be of type number"),
    "zero learning rate": (lambda b: _stage(b).update(train={"vision": {"lr": 0}}), "lr: Invalid value"),
    "pixels upside down": (lambda b: _stage(b).update(pixels={"min": 9000, "max": 4000}), "pixels.min must not exceed"),
    "unknown precision": (lambda b: _stage(b).update(precision="fp8"), "Unsupported value"),
    "fp16 without GPUs": (lambda b: _stage(b).update(precision="fp16"), "fp16 needs GPUs"),
    "unknown strategy": (lambda b: _stage(b).update(parallel={"strategy": "zero4"}), "Unsupported value"),
    "nvme without path": (lambda b: _stage(b).update(parallel={"offload_optimizer": "nvme"}), "nvme offload needs"),
    "gate without bound": (lambda b: _stage(b).update(gates=[{"metric": "loss"}]), "exactly one of below, above"),
    "grpo without rewards": (lambda b: _stage(b).update(objective="grpo", grpo={}), "needs `rewards`"),
    "grpo without its block": (lambda b: _stage(b).update(objective="grpo"), "needs the block `grpo`"),
    "first stage starts from": (lambda b: _stage(b).update(start_from="align"), "first stage has no earlier stage"),
    "start from nowhere": (lambda b: _stage(b, 1).update(start_from="nowhere"), "must name another stage"),
    "three workers bounds": (lambda b: _stage(b).update(resources={"workers": [1, 2, 3]}), "workers: (Invalid value|Too many)"),
    "zero workers": (lambda b: _stage(b).update(resources={"workers": 0}), "workers: Invalid value"),
    "no tokenizer": (lambda b: _recipe(b).update(tokenizer={}), "exactly one of path, train_vocabulary_size"),
    "no model": (lambda b: _recipe(b).update(model={}), "model needs config or pretrained"),
    "relative run directory": (lambda b: b["spec"]["storage"].update(uri="runs/x"), "uri: Invalid value"),
    "path without a volume": (lambda b: b["spec"]["storage"].update(uri="/runs/x"), "one of storage.volumes must be mounted"),
    "bad quantity": (lambda b: b["spec"]["runtime"]["worker"].update(memory="lots"), "memory: Invalid value"),
    "two topologies": (
        lambda b: b["spec"].update(queue={"name": "q", "topologyRequired": "a", "topologyPreferred": "b"}), "exclude each other"),
    "backoff over its cap": (
        lambda b: b["spec"].update(failurePolicy={"backoffSeconds": 100, "backoffCapSeconds": 10}), "must not exceed"),
    "rerun without token": (lambda b: b["spec"].update(rerunFrom="align"), "needs a resumeToken"),
    "rerun of nothing": (lambda b: b["spec"].update(rerunFrom="x", resumeToken="1"), "must name a stage"),
    "root user": (lambda b: b["spec"]["runtime"].update(runAsUser=0), "runAsUser: Invalid value"),
    "text longer than allowed": (lambda b: b["spec"]["runtime"].update(image="i" * 600), "image: Too long"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_spec_is_refused_with_a_readable_message(crd, what):
    change, expected = WRONG[what]
    bench = Bench(crd)
    body = tiny_curriculum()
    change(body)
    with pytest.raises(Refused) as caught:
        bench.store.create(body)
    assert re.search(expected, str(caught.value)), str(caught.value)


def test_right_spec_is_accepted_with_defaults_filled_in(crd):
    made = Bench(crd).store.create(tiny_curriculum())
    assert made["spec"]["recipe"]["stages"][0]["schedule"]["warmup"] == 0.03
    assert made["spec"]["failurePolicy"]["preRunningTimeoutSeconds"] == 1800
    assert made["spec"]["recipe"]["stages"][0]["optimizer"]["clip"] == 1.0


def test_null_where_null_has_a_meaning_is_kept(crd):
    made = Bench(crd).store.create(tiny_curriculum(stages=[tiny_stage("warmup", optimizer={"clip": None})]))
    assert made["spec"]["recipe"]["stages"][0]["optimizer"]["clip"] is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("recipe", "name"), "other"),
        (("recipe", "model"), {"pretrained": "s3://bucket/other"}),
        (("recipe", "tokenizer"), {"path": "s3://bucket/other"}),
        (("recipe", "data"), {"seed": 7}),
        (("storage", "uri"), "s3://bucket/other"),
        (("recipe", "stages"), [tiny_stage("warmup")]),
    ],
)
def test_fields_that_cannot_change(crd, path, value):
    bench = Bench(crd)
    bench.store.create(tiny_curriculum())
    with pytest.raises(Refused, match="cannot"):
        bench.edit(**{path[0]: {path[1]: value}})


def test_status_write_changes_nothing_else(crd):
    bench = Bench(crd)
    made = bench.store.create(tiny_curriculum())
    changed = copy.deepcopy(made)
    changed["spec"]["suspend"] = True
    changed["status"] = {"phase": "Pending", "unknown": 1}
    written = bench.store.replace_status(changed)
    assert written["spec"]["suspend"] is False
    assert written["status"] == {"phase": "Pending", "observedGeneration": 0, **written["status"]} or written["status"]["phase"]
    assert "unknown" not in written["status"]
    with pytest.raises(Exception, match="has been modified"):
        bench.store.replace_status(changed)
