"""What an RL stage's rollouts cost, for 7B and 72B shapes, against figures worked out by hand."""

from __future__ import annotations

import pytest

from terrace.planner.plan import make_plan
from terrace.planner.render import plan_values
from terrace.planner.rollouts import settled_copy
from terrace.planner.shapes import stage_shape
from terrace.recipe.loading import load_recipe

OF_72B = [
    "model.config.text_config.hidden_size=8192", "model.config.text_config.intermediate_size=29568",
    "model.config.text_config.num_hidden_layers=80", "model.config.text_config.num_attention_heads=64",
    "model.config.text_config.num_key_value_heads=8", "model.config.vision_config.out_hidden_size=8192",
]  # fmt: skip


def rollouts_of(*overrides: str, gpu: str = "h100-80gb"):
    plan = make_plan(load_recipe("mimo-vl-7b-rl", list(overrides)), gpu=gpu)
    [stage] = [stage for stage in plan.stages if stage.name == "morl"]
    [values] = [values for values in plan_values(plan)["stages"] if values["name"] == "morl"]
    return stage, values["rollouts"]


def test_a_model_of_7b_beside_training():
    stage, values = rollouts_of()
    size = sum(stage.parameters.values())
    language = load_recipe("mimo-vl-7b-rl", []).model.config["text_config"]
    head = language.get("head_dim") or language["hidden_size"] // language["num_attention_heads"]
    assert values["copy_bytes"] == values["sent_bytes"] == 2 * size
    assert values["gathered_bytes"] == round(4 * size * 63 / 64)
    assert values["sequence_bytes"] == 2 * language["num_hidden_layers"] * language["num_key_value_heads"] * head * 2 * 40960
    assert values["room_bytes"] == round(0.5 * stage.usable_bytes - 2 * size)
    assert values["sequences_per_gpu"] == int(values["room_bytes"] / values["sequence_bytes"])
    assert values["hand_over_seconds"] == pytest.approx((4 * size * 63 / 64 + 2 * size) / 25e9)
    read = stage.parameters["language"] - language["vocab_size"] * language["hidden_size"]  # all but the input embedding
    assert values["longest_response_seconds_at_least"] == pytest.approx(32768 * 2 * read / 3.35e12)
    assert any(f"room for {values['sequences_per_gpu']} of them" in note for note in stage.notes)


def test_options_decide_what_is_copied_and_moved():
    morl = "stages.morl"
    stage, native = rollouts_of(f"{morl}.grpo.engine=native", f"{morl}.parallel.strategy=zero2")
    assert native["copy_bytes"] == native["gathered_bytes"] == native["hand_over_seconds"] == 0
    assert native["room_bytes"] == round(stage.usable_bytes - stage.memory.weights - stage.memory.optimizer)
    assert any("no copy" in note for note in stage.notes)
    stage, sharded = rollouts_of(f"{morl}.grpo.engine=native")
    assert sharded["copy_bytes"] > 2 * sum(stage.parameters.values()), "the embedding stays float32"
    _, apart = rollouts_of(f"{morl}.grpo.placement=separate", f"{morl}.grpo.rollout_workers=16")
    assert apart["engines"] == 16
    assert apart["room_bytes"] == round(0.9 * stage.usable_bytes - apart["copy_bytes"])


def test_72b_does_not_fit_one_gpu_and_that_is_said():
    stage, values = rollouts_of(*OF_72B)
    assert 70e9 < sum(stage.parameters.values()) < 80e9
    assert values["sequences_per_gpu"] == 0
    assert any("no room for one longest sequence" in note for note in stage.notes)
    _, larger = rollouts_of(*OF_72B, "stages.morl.grpo.placement=separate", "stages.morl.grpo.rollout_workers=8", gpu="mi300x-192gb")
    assert larger["sequences_per_gpu"] > 0


def test_a_copy_that_leaves_no_room_is_divided_by_the_workers():
    """In rounds, under fsdp or zero3, and where the recipe does not say otherwise."""
    native = ("stages.morl.grpo.engine=native", "stages.morl.parallel.strategy=fsdp")
    stage, _ = rollouts_of(*native)
    assert stage.stage.grpo.shard_copy is False
    stage, large = rollouts_of(*native, *OF_72B)
    whole = 2 * sum(stage.parameters.values())  # bf16, and the embedding in float32
    assert stage.stage.grpo.shard_copy is True
    assert whole / 64 < large["copy_bytes"] < 0.1 * whole, "a share, and the embedding, which is the largest layer"
    assert large["copy_bytes"] > 4 * 151936 * 8192, "of which a rank has all while it runs"
    assert large["sent_bytes"] < 1.1 * whole / 64
    assert any("divided by the workers" in note and "grpo.shard_copy" in note for note in stage.notes)
    assert large["longest_response_seconds_at_least"] == pytest.approx(
        32768 * 2 * (stage.parameters["language"] - 151936 * 8192) / 25e9, rel=0.01
    ), "every token brings the weights through the network"
    _, asked = rollouts_of(*native, *OF_72B, "stages.morl.grpo.shard_copy=false")
    assert asked["copy_bytes"] > whole
    _, seamless = rollouts_of(*native, *OF_72B, "stages.morl.grpo.rollout=seamless")
    assert seamless["copy_bytes"] > whole


def test_a_copy_is_divided_as_soon_as_one_longest_sequence_has_no_room():
    plan = make_plan(load_recipe("mimo-vl-7b-rl", ["stages.morl.grpo.engine=native", "stages.morl.parallel.strategy=fsdp"]))
    [found] = [stage for stage in plan.stages if stage.name == "morl"]
    stage = found.stage.model_copy(update={"grpo": found.stage.grpo.model_copy(update={"shard_copy": None})})
    shape, rollouts = stage_shape(plan.recipe, stage), found.rollouts
    needed = found.memory.weights + found.memory.optimizer + rollouts.copy_bytes + rollouts.sequence_bytes
    for limit, divided in ((needed, False), (needed - 1, True), (None, False)):
        assert settled_copy(stage, shape, found.workers, found.memory, limit).grpo.shard_copy is divided
    assert settled_copy(stage, shape, 1, found.memory, 1.0).grpo.shard_copy is False, "one worker has all of it anyway"
