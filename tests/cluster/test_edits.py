"""Edits of a Curriculum: what applies at once, what is reported and ignored, and what is refused whole."""

from __future__ import annotations

from cluster_world import condition, tiny_curriculum, tiny_stage


def test_edit_of_a_later_stage_applies_and_of_a_started_one_is_reported(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 20, "step_seconds": 0.1}))
    bench.run(1.0)
    stages = [
        tiny_stage("warmup", budget={"steps": 999}),
        tiny_stage("align", budget={"steps": 7}),
        tiny_stage("added"),
    ]
    spec = bench.store.objects["Curriculum"]["tiny"]["spec"]
    bench.edit(recipe={**spec["recipe"], "stages": stages})
    bench.run(0.5)
    accepted = condition(bench.status(), "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "EditIgnored")
    assert "warmup" in accepted["message"]
    status = bench.run_until("Succeeded")
    assert status["stagesDone"] == "3/3"
    texts = {name: body["data"]["recipe.yaml"] for name, body in bench.store.objects["ConfigMap"].items() if "recipe" in name}
    last = texts[status["stages"][1]["recipeConfigMap"]]
    assert "steps: 7" in last
    assert "steps: 999" not in last


def test_layout_of_a_started_stage_applies_from_its_next_attempt(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 20, "step_seconds": 0.1}))
    bench.run(1.0)
    spec = bench.store.objects["Curriculum"]["tiny"]["spec"]
    stages = [{**spec["recipe"]["stages"][0], "resources": {"workers": 2}}, spec["recipe"]["stages"][1]]
    bench.edit(recipe={**spec["recipe"], "stages": stages})
    bench.run(0.5)
    assert condition(bench.status(), "Accepted")["status"] == "True"
    bench.store.delete("RayJob", "tiny-s0-1", foreground=True)
    bench.run(2.0)
    workers = bench.store.objects["RayJob"]["tiny-s0-2"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == 2


def test_removed_running_stage_is_refused_and_nothing_is_half_applied(bench):
    bench.store.create(tiny_curriculum(behaviour={"steps": 20, "step_seconds": 0.1}))
    bench.run(1.0)
    spec = bench.store.objects["Curriculum"]["tiny"]["spec"]
    bench.edit(recipe={**spec["recipe"], "stages": [tiny_stage("other"), spec["recipe"]["stages"][1]]})
    bench.run(1.0)
    accepted = condition(bench.status(), "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "EditRefused")
    assert bench.jobs() == ["tiny-s0-1"]
    bench.edit(recipe=spec["recipe"])
    bench.run_until("Succeeded")


def test_invalid_spec_shows_why_and_starts_when_corrected(bench):
    wrong = tiny_curriculum(stages=[tiny_stage("warmup", resources={"workers": 4, "gpus_per_worker": 0.5})])
    bench.store.create(wrong)
    bench.run(1.0)
    accepted = condition(bench.status(), "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "InvalidSpec")
    assert "0.5 GPUs" in accepted["message"]
    assert bench.jobs() == []
    stage = {**bench.store.objects["Curriculum"]["tiny"]["spec"]["recipe"]["stages"][0], "resources": {"workers": 1}}
    bench.edit(recipe={**bench.store.objects["Curriculum"]["tiny"]["spec"]["recipe"], "stages": [stage]})
    bench.run_until("Succeeded")
