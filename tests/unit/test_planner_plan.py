"""The plan's numbers follow from the recipe, name what does not fit, and the changes it names do fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from terrace import cli
from terrace.errors import InputError
from terrace.planner.data_facts import SampleMeans, SourceFacts
from terrace.planner.gpus import GPUS, find_gpu
from terrace.planner.memory import stage_memory, worst_pack
from terrace.planner.parameters import part_sizes
from terrace.planner.plan import StagePlan, make_plan, workers_for
from terrace.planner.render import plan_values
from terrace.planner.shapes import model_shape
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Planning
from terrace.recipe.schema_grpo import OverlapOptions

REPOSITORY = Path(__file__).resolve().parents[2]
MIMO = REPOSITORY / "jobs" / "recipes" / "mimo-vl-7b.yaml"
TINY = REPOSITORY / "tests" / "recipes" / "tiny.yaml"


def test_mimo_vl_7b_on_256_gpus() -> None:
    values = plan_values(make_plan(load_recipe(MIMO), gpu="h100-80gb", gpus=256))
    first, _, third, fourth = values["stages"]
    assert [stage["name"] for stage in values["stages"]] == [
        "projector-warmup", "alignment", "multimodal-pretraining", "long-context-sft",
    ]  # fmt: skip
    assert first["parameters"] == {
        "vision": 636_401_664, "projector": 47_196_416, "language": 7_622_619_136, "total": 8_306_217_216,
    }  # fmt: skip
    assert [stage["trainable_parameters"] for stage in values["stages"]] == [47_196_416, 683_598_080, 8_306_217_216, 8_306_217_216]
    assert [stage["steps"] for stage in values["stages"]] == [14_306, 7_964, 66_758, 13_114]
    assert values["total"]["tokens"] == pytest.approx(2.417e12, rel=1e-3)
    assert third["flops"] == pytest.approx(6 * 7e9 * 1.4e12, rel=0.35)  # 6 N D of the language model, and the vision tower
    assert third["flops_per_step"]["backward"]["language"] == 2 * third["flops_per_step"]["forward"]["language"]
    assert first["flops_per_step"]["backward"]["vision"] == 0
    assert fourth["gpu_hours"] == pytest.approx(fourth["flops"] / (989.4e12 * 0.4 * 3600))
    assert values["total"]["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in values["stages"]))
    assert values["total"]["fits"] is True
    for stage in values["stages"]:
        memory = stage["memory_per_gpu_bytes"]
        parts = sum(memory[name] for name in ("weights", "gradients", "optimizer", "activations", "logits", "buffers"))
        assert memory["total"] == pytest.approx(parts, abs=8)


@pytest.mark.parametrize(
    ("strategy", "packs", "bytes_per_parameter"),
    [
        ("ddp", 8, 4 + 4 + 8),
        ("zero1", 8, 2 + 2 + 4 + 12 / 8),  # bf16 weights and gradients, float32 sums of these, masters and moments
        ("zero2", 8, 2 + (4 + 12) / 8),
        ("zero3", 8, (2 + 4 + 12) / 8),
        ("fsdp", 8, 16 / 8),
        ("fsdp", 16, 4 / 8 + 4 + 8 / 8),  # accumulation keeps whole gradients until a step's last pack
    ],
)
def test_bytes_per_parameter_of_each_strategy(strategy: str, packs: int, bytes_per_parameter: float) -> None:
    recipe = load_recipe(MIMO, [f"stages.2.parallel.strategy={strategy}", f"stages.2.batch.packs={packs}", "stages.2.resources.workers=8"])
    stage = recipe.stages[2]
    memory = stage_memory(model_shape(recipe), stage, 8, worst_pack(stage, True))
    held = memory.weights + memory.gradients + memory.optimizer
    assert held == pytest.approx(bytes_per_parameter * 8_306_217_216, rel=1e-6)


@pytest.mark.parametrize(("strategy", "matrices"), [("ddp", 4 / 8), ("fsdp", 4 / 8)])
def test_muons_momentum_is_kept_once_among_workers(strategy: str, matrices: float) -> None:
    changes = ["stages.2.optimizer.kind=muon", f"stages.2.parallel.strategy={strategy}", "stages.2.resources.workers=8"]
    recipe = load_recipe(MIMO, changes)
    shape, stage = model_shape(recipe), recipe.stages[2]
    outer = 2 * shape.language.vocabulary * shape.language.width  # embeddings and output layer, which AdamW steps
    expected = matrices * (8_306_217_216 - outer) + 8 * outer / (8 if strategy == "fsdp" else 1)
    assert stage_memory(shape, stage, 8, worst_pack(stage, True)).optimizer == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("gpu", "asked", "every_pack", "fits"), [
    ("h100-80gb", None, False, True), ("l40s-48gb", None, True, True),
    ("l40s-48gb", "false", False, False), ("h100-80gb", "true", True, True),
])  # fmt: skip
def test_gradients_are_reduced_at_every_pack_where_whole_ones_do_not_fit(gpu: str, asked: str | None, every_pack: bool, fits: bool) -> None:
    changes = ["stages.2.parallel.strategy=fsdp", "stages.2.batch.packs=16", "stages.2.resources.workers=8"]
    changes += [f"stages.2.parallel.reduce_every_pack={asked}"] if asked else []
    changes += ["stages.2.train.language.activation_checkpointing=true", "stages.2.train.vision.activation_checkpointing=true"]
    plan = make_plan(load_recipe(MIMO, changes), gpu=gpu, gpus=8)
    stage, values = plan.stages[2], plan_values(plan)["stages"][2]
    assert (values["reduce_every_pack"], values["fits"]) == (every_pack, fits)
    assert values["memory_per_gpu_bytes"]["gradients"] == pytest.approx(4 * 8_306_217_216 / (8 if every_pack else 1), rel=1e-6)
    assert any("reduced at every pack" in note for note in stage.notes) == every_pack
    if not fits:
        assert stage.changes[0].overrides == ["parallel.reduce_every_pack=true"]
    for one in plan.stages[:2]:
        assert not any("every pack" in note for note in one.notes)  # other strategies have nothing to choose


def test_divided_experts_and_hybrid_shards_are_planned() -> None:
    """A worker's memory lacks the experts that others hold, and what it sends them is said."""
    recipe = REPOSITORY / "jobs" / "recipes" / "qwen3-vl-30b-a3b.yaml"
    common = ["stages.0.resources.workers=8", "stages.0.batch.packs=8", "stages.0.parallel={strategy: ddp}"]
    whole, divided = (make_plan(load_recipe(recipe, [*common, *more]), gpu="h100-80gb", gpus=8).stages[0] for more in (
        [], ["stages.0.parallel.experts=8"],
    ))  # fmt: skip
    experts = 3 * 2048 * 768 * 128 * 48  # three matrices of width 2,048 and 768, in 128 experts of 48 layers
    assert whole.memory.weights - divided.memory.weights == pytest.approx(4 * experts * 7 / 8)
    [note] = [note for note in divided.notes if "share the experts" in note]
    sent = 2 * 2 * 8 * divided.stage.sequence_length * 2048 * 48 * 7 / 8  # there and back, in bf16, 8 experts of a token
    again = divided.stage.frozen_activation_checkpointing
    assert divided.stage.train.language is None
    assert f"{(3 if again else 2) * sent / 2**30:.3g} GiB" in note
    hybrid = make_plan(load_recipe(recipe, [*common, "stages.0.parallel={strategy: fsdp, hybrid_shard_size: 4}"]), gpus=8).stages[0]
    assert any("4 workers divide the weights, 2 groups" in note for note in hybrid.notes)


def test_second_models_of_reinforcement_learning_are_planned() -> None:
    """A reference is divided where weights are; an engine's copy counts in a step only where it generates meanwhile."""
    recipe = load_recipe(REPOSITORY / "jobs" / "recipes" / "mimo-vl-7b-rl.yaml")
    shape, (number, stage) = model_shape(recipe), next((n, s) for n, s in enumerate(recipe.stages) if s.objective == "grpo")
    assert stage.grpo is not None

    def weights(strategy: str, **grpo: Any) -> float:
        plain = {"engine": "native", "placement": "colocated", "overlap": None, "kl_coefficient": 0.0}
        options = stage.grpo.model_copy(update={**plain, **grpo})
        parallel = stage.parallel.model_copy(update={"strategy": strategy})
        changed = stage.model_copy(update={"grpo": options, "parallel": parallel})
        notes.append(make_plan(recipe.model_copy(update={"stages": [*recipe.stages[:number], changed]}), gpus=8).stages[number].notes)
        return stage_memory(shape, changed, 8, worst_pack(changed, True)).weights

    notes: list[list[str]] = []
    whole = sum(size.total for size in part_sizes(shape).values())
    for strategy, held in (("fsdp", 4 * whole / 8), ("zero3", 4 * whole / 8), ("ddp", 4 * whole), ("zero2", 4 * whole)):
        assert weights(strategy, kl_coefficient=0.1) - weights(strategy) == pytest.approx(held)
    copy = weights("fsdp", overlap=OverlapOptions()) - weights("fsdp")
    assert 2 * whole < copy < 4 * whole
    said = [" ".join(one) for one in notes]
    assert "GiB of weights in each while it generates" in said[0]
    assert "no copy" in said[4]  # ddp decodes with what it trains
    assert "GiB of weights in each always" in said[-2]
    weights("fsdp", placement="separate")
    assert "GiB of weights in each always" in " ".join(notes[-1])


def test_frozen_parts_cost_neither_gradients_nor_optimizer() -> None:
    recipe = load_recipe(MIMO, ["stages.0.parallel.strategy=ddp"])
    stage = recipe.stages[0]
    memory = stage_memory(model_shape(recipe), stage, 1, worst_pack(stage, True))
    assert memory.gradients == 4 * 47_196_416
    assert memory.optimizer == 8 * 47_196_416


def test_checkpointing_saves_activations_only() -> None:
    values = plan_values(make_plan(load_recipe(MIMO)))
    for stage in values["stages"]:
        kept, recomputed = stage["activations_without_checkpointing"], stage["activations_with_checkpointing"]
        assert recomputed["language"] < 0.15 * kept["language"]
        assert recomputed["vision"] <= kept["vision"]


def test_what_does_not_fit_says_what_to_change_and_the_changed_plan_fits(tmp_path: Path) -> None:
    plan = make_plan(load_recipe(MIMO), gpu="rtx-4090-24gb", gpus=8)
    assert not plan.fits
    assert all(stage.changes for stage in plan.stages if not stage.fits)
    for number in (0, -1):  # the nearest change of each stage, then the alternatives
        overrides, gpus = [], 8
        for stage in plan.stages:
            if not stage.fits:
                change = stage.changes[number]
                overrides += change.describe(stage.name, stage.workers)
                gpus = max(gpus, change.workers)
        changed = make_plan(load_recipe(MIMO, overrides), gpu="rtx-4090-24gb", gpus=None if number else 8)
        if number == 0:
            assert changed.fits, overrides
        else:
            grown = {stage.name for stage in plan.stages if not stage.fits and stage.changes[-1].workers > 8}
            assert all(stage.fits for stage in changed.stages if stage.name in grown)


def test_a_stage_that_fits_needs_no_change() -> None:
    assert all(stage.changes == [] for stage in make_plan(load_recipe(MIMO), gpus=256).stages)


def test_gpus_that_the_batch_does_not_divide_by_stay_unused() -> None:
    recipe = load_recipe(MIMO)
    assert [workers_for(stage, 200) for stage in recipe.stages] == [160, 160, 160, 160]
    assert workers_for(recipe.stages[0], None) == 256
    plan = make_plan(recipe, gpus=200)
    assert "160 of 200" in plan.stages[0].notes[0]


def test_gpus_are_found_by_name_and_extended_by_the_recipe() -> None:
    with pytest.raises(InputError, match="did you mean `h100-80gb`"):
        find_gpu("h100-80g", Planning())
    recipe = load_recipe(TINY, ["planning.gpus={mine: {memory_gib: 2, bf16_tflops: 10, price_per_hour: 0.5}}", "planning.gpu=mine"])
    plan = make_plan(recipe)
    assert (plan.gpu.memory_gib, plan.price_per_gpu_hour) == (2, 0.5)
    assert all(gpu.source for gpu in GPUS.values())


def test_budgets_become_steps() -> None:
    def steps(budget: str) -> int | None:
        return make_plan(load_recipe(TINY, [f"stages.0.budget={budget}"])).stages[0].work.steps

    assert steps("{steps: 7}") == 7
    assert steps("{tokens: 2049}") == 3  # 4 packs of 256 tokens
    assert steps("{epochs: 2}") is None
    values = plan_values(make_plan(load_recipe(TINY, ["stages.0.budget={epochs: 2}"])))
    assert values["stages"][0]["gpu_hours"] is None
    assert values["total"]["gpu_hours"] is None


def test_qwen_vl_takes_the_published_number_of_steps() -> None:
    plan = make_plan(load_recipe(REPOSITORY / "jobs" / "recipes" / "qwen-vl-7b.yaml"))
    assert [stage.work.steps for stage in plan.stages] == pytest.approx([50_000, 19_000, 8_000], rel=1e-3)


def test_an_index_makes_samples_and_epochs_exact() -> None:
    recipe = load_recipe(TINY, ["stages.1.budget={epochs: 2}", "stages.1.mixture={captions: 3, documents: 1}"])
    short = SourceFacts(90, SampleMeans(64, 40, 64 * 64, 16, 16 * 16 * 16, 9_000))
    long = SourceFacts(30, SampleMeans(128, 100, 128 * 128, 20, 20 * 20 * 16, 12_000))
    facts = [{"captions": short, "documents": long, "text": short, "grounding": short, "instructions": short}] * 4
    stage = make_plan(recipe, facts=facts).stages[1]
    assert stage.work.exact
    assert stage.work.samples == 240
    assert stage.work.sources["captions"].epochs == pytest.approx(2)
    assert stage.work.sources["documents"].samples == pytest.approx(60)
    assert stage.work.steps == 19  # 240 samples of 80 tokens on average, 4 x 256 tokens a step
    assert stage.work.pack.tokens == pytest.approx(256, rel=0.01)
    assert stage.work.pack.visual_tokens == pytest.approx(256 * 17 / 80, rel=0.01)


def test_stages_of_compared_answers_count_rows_and_what_runs_forward_beside() -> None:
    """An index knows prompt and chosen answer, 100 tokens of which 30 are the answer; the rejected one is taken to be as long."""
    whole = SourceFacts(96, SampleMeans(100, 30, 100 * 100, 16, 16 * 16 * 16, 9_000))

    def stage(objective: str, *changes: str, indexed: bool = True) -> StagePlan:
        recipe = load_recipe(TINY, [
            "data.sources.pairs={uri: nowhere, kind: preference}", "stages.1.mixture={captions: null, documents: null, pairs: 1}",
            f"stages.1.objective={objective}", "stages.1.budget={epochs: 3}", "stages.1.batch={packs: 8}", *changes,
        ])  # fmt: skip
        facts = [dict.fromkeys(recipe.data.sources, whole) if indexed else {}] * len(recipe.stages)
        return make_plan(recipe, facts=facts).stages[1]

    plan = stage("dpo")
    assert plan.work.samples == 3 * 96
    assert plan.work.steps == 3 * 96 / 8
    assert plan.work.pack.tokens == 130
    assert plan.work.pack.supervised_tokens == 60
    assert plan.work.pack.token_squares == 70 * 70 + 2 * 70 * 30 + 30 * 30 + 30 * 100  # the second answer sees prompt and itself
    forward = sum(plan.pack_flops.forward.values())
    assert plan.reference_flops == pytest.approx(96 * forward)  # each row once, whatever the epochs
    assert plan.hours * 3600 == pytest.approx(plan.work.steps * plan.step_seconds + plan.reference_seconds)
    rate = plan.reference_flops / plan.reference_seconds
    assert plan.step_seconds == pytest.approx(8 * plan.pack_flops.model / rate)
    for free in (stage("orpo"), stage("dpo", "stages.1.dpo.reference_free=true")):
        assert free.reference_flops == 0
        assert free.step_seconds == pytest.approx(plan.step_seconds)
    kto = stage("kto")  # each prompt with another one's answer, in the reference and in every step
    assert kto.reference_flops == pytest.approx(96 * forward * (1 + 100 / 130))
    assert kto.step_seconds == pytest.approx(plan.step_seconds + 8 * forward * (100 / 130) / rate)
    assert "reference" in " ".join(kto.notes)
    unknown = stage("dpo", indexed=False)
    assert unknown.reference_flops is unknown.hours is None


def test_a_remote_model_cannot_be_planned() -> None:
    recipe = load_recipe(TINY, ["model.config=null", "model.pretrained=s3://models/somewhere"])
    with pytest.raises(InputError, match="needs the model's shape"):
        make_plan(recipe)


def test_a_local_model_is_planned_from_its_config(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["tokenizer=/none", "model.config.text_config.vocab_size=1024"])
    (tmp_path / "config.json").write_text(json.dumps(recipe.model.config))
    local = load_recipe(TINY, [f"model.pretrained={tmp_path}"])
    assert model_shape(local) == model_shape(recipe)


# ---------------------------------------------------------------- the command


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(MIMO), "--gpus", "256", "--mfu", "0.5", "--price", "4", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    total = values["total"]
    assert values["mfu"] == 0.5
    assert total["cost"] == pytest.approx(4 * total["gpu_hours"])


def test_the_command_prints_a_table_that_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(MIMO), "--gpu", "rtx-4090-24gb", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "does NOT fit" in text
    assert "stages.projector-warmup.frozen_activation_checkpointing=true" in text


def test_epochs_are_known_once_the_rows_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Row {number} of forty."}) + "\n" for number in range(40)))
    values = yaml.safe_load(TINY.read_text())
    values["data"]["sources"] = {"text": {"uri": "text.jsonl", "kind": "text", "holdout_samples": 10}}
    values["stages"] = [{**values["stages"][2], "mixture": {"text": 1.0}, "budget": {"epochs": 2}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    ask = ["plan", str(tmp_path / "recipe.yaml"), "--json"]

    def planned(*more: str) -> dict:
        assert cli.main([*ask, *more]) == 0
        return json.loads(capsys.readouterr().out)["stages"][0]

    assert planned()["steps"] is None
    assert any("--index counts them" in note for note in planned()["notes"])
    counted = planned("--index")
    assert (counted["samples"], counted["exact"]) == (60, True)
    assert counted["steps"] >= 1
    assert planned("--index") == counted
    assert cli.main([*ask, "--index", "--data", str(tmp_path)]) == 2
    with (tmp_path / "text.jsonl").open("a") as rows:
        rows.write('{"text": "another one"}\n')
    assert planned("--index")["samples"] == 62, "rows that came since"


def test_a_wrong_recipe_or_gpu_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(MIMO), "stages.0.budgt.steps=1"]) == 2
    assert cli.main(["plan", str(MIMO), "--gpu", "h100"]) == 2
    assert capsys.readouterr().err.count("did you mean") == 2


def test_planning_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from terrace.recipe.loading import load_recipe; from terrace.planner.plan import make_plan; "
        f"make_plan(load_recipe({str(MIMO)!r})); assert not {{'torch', 'ray', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
