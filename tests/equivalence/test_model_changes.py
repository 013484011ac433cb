"""Changes of the model between stages: planned, made once, resumed to the same bits, exported, and undone by `start_from`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_steps import moe_case, train_experts
from families import CONFIGS, case_of, conversation, pack_of, recipe_model
from packs import tiny_recipe
from PIL import Image
from processes import run_ranks
from transformers import AutoModelForImageTextToText

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import load_prepared, prepare_data, stage_data
from terrace.errors import DamagedData, InputError, Preempted
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.models.forward import pack_hidden
from terrace.models.modules.sparse_mlp import SparseMlp
from terrace.models.parts import part_parameters
from terrace.models.surgery import stretched_positions
from terrace.models.tensor_files import Directory
from terrace.planner.parameters import parameter_counts
from terrace.planner.plan import make_plan
from terrace.planner.shapes import shape_of_config
from terrace.recipe.changes import stage_model, stage_recipe
from terrace.recipe.identity import recipe_hash, stage_hash
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

WITHOUT = {name: value for name, value in CONFIGS["terrace_vlm"]["text_config"].items() if name != "vocab_size"}
PARTS = {part: {"lr": 1e-3} for part in ("vision", "projector", "language")}


def write_rows(folder: Path) -> None:
    rows = []
    for number, (name, colour) in enumerate([("red", (220, 30, 30)), ("green", (30, 200, 60)), ("blue", (40, 60, 220))] * 5):
        Image.new("RGB", (40 + 5 * number, 90 - 3 * number), colour).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"A picture in {name}, number {number}."})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights_of(run_dir: Path, stage: str) -> str:
    return hashlib.sha256((run_dir / "stages" / stage / "final" / "model.safetensors").read_bytes()).hexdigest()


def recipe_of(folder, changes: dict, config: dict | None = None, architecture: str = "terrace_vlm") -> Recipe:
    """Three stages: as it is, changed, and one that starts from the first again. The changed one trains a little."""
    common = {
        "sequence_length": 512, "precision": "fp32", "batch": {"packs": 2}, "pixels": {"min": 784, "max": 12_544},
        "checkpoint": {"every_steps": 1}, "schedule": {"kind": "constant", "warmup": 0}, "loss_chunk_tokens": 64, "train": PARTS,
        "data_loading": {"engine": "inline", "window_samples": 32}, "evaluate": {"max_samples_per_kind": 2},
        "mixture": {"weights": {"captions": 1.0}},
    }  # fmt: skip
    return Recipe.model_validate({
        "name": "changes", "model": {"architecture": architecture, "config": config or CONFIGS["terrace_vlm"]},
        "data": {"sources": {"captions": {"uri": str(folder / "captions.jsonl"), "kind": "caption", "holdout_samples": 3}}},
        "tokenizer": {"train_vocabulary_size": 400},
        "stages": [
            {"name": "before", "budget": {"steps": 1}, **common},
            {"name": "changed", "budget": {"steps": 3}, "model_changes": changes, **common},
            {"name": "after", "budget": {"steps": 1}, **common},
            {"name": "back", "budget": {"steps": 1}, "start_from": "before", **common},
        ],
    })  # fmt: skip


@pytest.mark.slow
def test_positions_and_rope_base_change_between_stages(tmp_path):
    """56 to 84 pixels, RoPE base 10 000 to 800 000: shapes, data, plan, resume, export, the stage after it and the way back."""
    torch.set_num_threads(1)
    write_rows(tmp_path)
    recipe = recipe_of(tmp_path, {"interpolate_positions": 84, "rope_base": 800000.0})
    assert check(recipe) == []
    sides = [stage_model(recipe, number).config["vision_config"]["image_size"] for number in range(4)]
    assert sides == [56, 84, 84, 56]
    seen = stage_recipe(recipe, 1)
    assert stage_hash(seen, 1) == stage_hash(recipe, 1)
    assert recipe_hash(seen) == recipe_hash(recipe)
    assert stage_recipe(seen, 3).model.config["vision_config"]["image_size"] == 56
    run_dir = tmp_path / "run"
    prepare_data(recipe, run_dir, use_ray=False)
    for number in range(4):
        run_stage(recipe, number, run_dir, 1, WorkerContext())
    finals = [run_dir / "stages" / name / "final" for name in ("01-before", "02-changed", "03-after", "04-back")]
    configs = [json.loads((final / "config.json").read_text()) for final in finals]
    assert [config["vision_config"]["image_size"] for config in configs] == sides
    assert [config["text_config"]["rope_parameters"]["rope_theta"] for config in configs] == [10000.0, 800000.0, 800000.0, 10000.0]
    table = "model.vision_tower.embeddings.position_embedding.weight"
    assert [Directory(final).shape(table)[0] for final in finals] == [17, 37, 37, 17]
    plan = make_plan(recipe)
    assert [stage.parameters["vision"] - plan.stages[0].parameters["vision"] for stage in plan.stages] == [0, 20 * 32, 20 * 32, 0]
    # What the changed stage begins with is the first one's final weights, only its positions stretched.
    prepared = load_prepared(run_dir / "data")
    seen, data = stage_data(recipe, 1, prepared)
    assert (data.family.side, prepared.family.side, data.indexes["captions"].family.side) == (84, 56, 84)
    config = model_config(seen.model, prepared.tokenizer())
    model = build_model(seen.model, config, start=finals[0], changes=recipe.stages[1].model_changes)
    before = Directory(finals[0])
    for name, parameter in model.named_parameters():
        old = before.read(name)
        expected = stretched_positions(old, tuple(parameter.shape)) if name == table else old
        assert torch.equal(parameter, expected), name
    # Stopped inside the changed stage, it ends with the same bits.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "stages" / "02-changed")
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 1, again, 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 1 else None))
    run_stage(recipe, 1, again, 2, WorkerContext())
    assert weights_of(again, "02-changed") == weights_of(run_dir, "02-changed")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["blip_2", "gemma3", "idefics", "instructblip", "paligemma"])
def test_towers_of_one_square_are_stretched_in_every_family_that_has_one(family, tmp_path):
    """56 to 84 pixels: the plan's counts, what the changed stage begins with, and its steps."""
    torch.set_num_threads(1)
    write_rows(tmp_path)
    recipe = recipe_of(tmp_path, {"interpolate_positions": 84}, CONFIGS[family], family)
    assert check(recipe) == []
    run_dir = tmp_path / "run"
    prepare_data(recipe, run_dir, use_ray=False)
    for number in range(2):
        run_stage(recipe, number, run_dir, 1, WorkerContext())
    seen, data = stage_data(recipe, 1, load_prepared(run_dir / "data"))
    assert data.family.side == 84
    before = Directory(run_dir / "stages" / "01-before" / "final")
    config = model_config(seen.model, load_prepared(run_dir / "data").tokenizer())
    model = build_model(seen.model, config, start=Path(before.path), changes=recipe.stages[1].model_changes)
    [table] = [name for name, parameter in model.named_parameters() if tuple(parameter.shape) != tuple(before.shape(name))]
    assert "position_embedding" in table
    for name, parameter in model.named_parameters():
        old = before.read(name)
        assert torch.equal(parameter, stretched_positions(old, tuple(parameter.shape)) if name == table else old), name
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    assert parameter_counts(shape_of_config(config.to_dict(), family)) == counted


def test_positions_are_stretched_by_bicubic_convolution_beside_other_tokens():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1 + 16, 6, generator=generator)
    wide = stretched_positions(table, (1 + 36, 6))
    assert torch.equal(wide[0], table[0])

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weights = np.zeros((6, 4))
    for place in range(6):
        centre = (place + 0.5) * 4 / 6 - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[place, min(max(tap, 0), 3)] += kernel(centre - tap)
    expected = np.einsum("ar,bc,rcw->abw", weights, weights, table[1:].view(4, 4, 6).numpy()).reshape(36, 6)
    np.testing.assert_allclose(wide[1:].numpy(), expected, atol=1e-5)
    assert stretched_positions(table[None], (1, 37, 6)).shape == (1, 37, 6)  # InternVL's table has a batch dimension
    with pytest.raises(ValueError, match="cannot be stretched"):
        stretched_positions(table, (36, 6))


def test_mistakes_are_named():
    def told(changes: dict, **stage) -> list[str]:
        values = tiny_recipe([{"name": "one"}, {"name": "two", "model_changes": changes, **stage}]).model_dump(mode="json")
        return [str(problem) for problem in check(Recipe.model_validate(values)) if "model_changes" in str(problem) or stage]

    assert any("no learned positions of one fixed picture size" in line for line in told({"interpolate_positions": 448}))
    assert any("changes nothing" in line for line in told({}))
    assert told({"rope_base": 5e5}) == []
    recipe = recipe_of(Path("/none"), {"interpolate_positions": 90})
    assert any("90 is no multiple of patch_size 14" in str(problem) for problem in check(recipe))


# ---------------------------------------------------------------- experts


def written_out(module: SparseMlp, hidden: torch.Tensor, capacity: int | None) -> tuple[torch.Tensor, int]:
    """Token by token: the published rule of first choices before second ones, up to an expert's capacity."""
    tokens, experts = hidden.reshape(-1, hidden.shape[-1]), len(module.gate_up_proj)
    chances = torch.softmax(tokens @ module.gate.weight.t(), dim=-1)
    ranked = chances.argsort(dim=-1, descending=True)[:, : module.per_token]
    taken: list[list[int]] = [[] for _ in tokens]
    load, dropped = [0] * experts, 0
    for choice in range(module.per_token):
        for token in range(len(tokens)):
            expert = int(ranked[token, choice])
            if capacity is None or load[expert] < capacity:
                load[expert] += 1
                taken[token].append(expert)
            else:
                dropped += 1
    rows = []
    for token, own in enumerate(taken):
        total = sum(chances[token, expert] for expert in own)
        row = torch.zeros_like(tokens[token])
        for expert in own:
            gate, up = (module.gate_up_proj[expert] @ tokens[token]).chunk(2)
            row = row + chances[token, expert] / total * (module.down_proj[expert] @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(row)
    return torch.stack(rows).view_as(hidden), dropped


def test_a_mixture_of_experts_is_its_written_out_rule():
    torch.manual_seed(0)
    for per_token, factor in ((1, None), (2, None), (2, 1.0), (2, 0.5), (3, 1.5)):
        module = SparseMlp(12, 8, 4, per_token, factor).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
        hidden = torch.randn(1, 21, 12, dtype=torch.float64)
        capacity = None if factor is None else int(np.ceil(factor * per_token * 21 / 4))
        expected, dropped = written_out(module, hidden, capacity)
        close = {"rtol": 1e-5, "atol": 1e-5}  # routers decide in float32
        torch.testing.assert_close(module(hidden), expected, **close)
        assert int(module.dropped or 0) == dropped
        with torch.no_grad():  # answers and evaluations: nothing is left out
            torch.testing.assert_close(module(hidden), written_out(module, hidden, None)[0], **close)
        assert (factor is None or factor >= 1.5) or dropped > 0


def test_a_dense_model_is_upcycled_between_stages(tmp_path):
    """Experts begin as copies, so the model begins where the dense one ended; counted, balanced, resumed, exported, undone."""
    torch.set_num_threads(1)
    write_rows(tmp_path)
    recipe = recipe_of(tmp_path, {"upcycle": {"experts": 4, "per_token": 2, "capacity_factor": 1.0, "layers": "every_second"}})
    assert check(recipe) == []
    run_dir = tmp_path / "run"
    prepare_data(recipe, run_dir, use_ray=False)
    for number in range(4):
        run_stage(recipe, number, run_dir, 1, WorkerContext())
    finals = [run_dir / "stages" / name / "final" for name in ("01-before", "02-changed", "03-after", "04-back")]
    sparse = "model.language_model.layers.0.mlp.gate_up_proj"
    assert [sparse in Directory(final).names for final in finals] == [False, True, True, False]
    assert "model.language_model.layers.1.mlp.gate_proj.weight" in Directory(finals[1]).names  # every second layer only
    prepared = load_prepared(run_dir / "data")
    seen = stage_recipe(recipe, 1)
    config = model_config(seen.model, prepared.tokenizer())
    model = build_model(seen.model, config, start=finals[0], changes=recipe.stages[1].model_changes).eval()
    dense = build_model(recipe.model, model_config(recipe.model, prepared.tokenizer()), start=finals[0]).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    planned = make_plan(recipe).stages
    shape = shape_of_config(config.to_dict(), "terrace_vlm")
    assert parameter_counts(shape) == counted
    assert planned[1].parameters["language"] > planned[0].parameters["language"] == planned[3].parameters["language"]
    assert planned[1].active["language"] < planned[1].parameters["language"]
    lines = [json.loads(line) for line in (run_dir / "stages" / "02-changed" / "metrics.jsonl").read_text().splitlines()]
    assert all(sum(line["expert_tokens"]) > 0 and line["expert_balance_loss"] > 0 for line in lines)
    assert all(0 < line["expert_dropped_share"] < 1 for line in lines)
    assert "expert_tokens" not in (run_dir / "stages" / "01-before" / "metrics.jsonl").read_text()
    # What is exported is what was trained, for whoever loads it.
    exported = AutoModelForImageTextToText.from_pretrained(finals[2], dtype=torch.float32).eval()
    again_built = build_model(stage_recipe(recipe, 2).model, config, start=finals[2]).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(input_ids=ids).logits, again_built(input_ids=ids).logits)
    assert (finals[2] / "sparse_mlp.py").is_file()
    # Stopped inside the changed stage, it ends with the same bits.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "stages" / "02-changed")
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 1, again, 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 1 else None))
    run_stage(recipe, 1, again, 2, WorkerContext())
    assert weights_of(again, "02-changed") == weights_of(run_dir, "02-changed")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_upcycled_experts_train_alike_however_packed_and_under_every_strategy(tmp_path):
    torch.set_num_threads(1)
    three, two = [[0, 1], [2], [3, 4]], [[0, 1, 2], [3, 4]]
    random = build_model(moe_case("terrace_vlm", tmp_path / "own").section, moe_case("terrace_vlm", tmp_path / "own").config)
    assert all(0.01 < float(layer.mlp.gate_up_proj.detach().std()) < 0.03 for layer in random.model.language_model.layers)
    [alone, packed] = train_experts(0, 1, "terrace_vlm", [("ddp", three, {}), ("ddp", [[0, 1, 2, 3, 4]], {})], str(tmp_path))
    runs = [(strategy, two, {}) for strategy in ("ddp", "fsdp", "zero2", "zero3")]
    together = run_ranks(2, train_experts, "terrace_vlm", runs, str(tmp_path), timeout=800)[0]
    for lines in (packed, *together):
        for line, other in zip(alone[1:3], lines[1:3]):
            for field in ("loss", "grad_norm", "expert_balance_loss"):
                np.testing.assert_allclose(line[field], other[field], rtol=1e-4, err_msg=field)
            assert line["expert_tokens"] == other["expert_tokens"]
    assert sum(alone[1]["expert_tokens"]) > 0


def test_mistakes_of_experts_are_named(tmp_path):
    def told(recipe: Recipe) -> list[str]:
        return [str(problem) for problem in check(recipe)]

    assert any("5 is more than the 4 experts" in line for line in told(recipe_of(tmp_path, {"upcycle": {"per_token": 5}})))
    twice = recipe_of(tmp_path, {"upcycle": {}})
    stages = [*twice.stages[:2], twice.stages[2].model_copy(update={"model_changes": twice.stages[1].model_changes}), twice.stages[3]]
    assert any("a mixture of experts already" in line for line in told(twice.model_copy(update={"stages": stages})))
    other = tiny_recipe([{"name": "one"}, {"name": "two", "model_changes": {"upcycle": {}}}])
    assert any("has no mixture of experts; architecture terrace_vlm has" in line for line in told(other))
    longer = tiny_recipe([{"name": "one"}, {"name": "two", "model_changes": {"add_tokens": 8}}], model=recipe_model("mllama"))
    assert any("keeps the rows of its own marks behind the vocabulary" in line for line in told(longer))


def test_tokens_are_added_between_stages(tmp_path):
    """Rows of embedding and output layer: their number by stage, what they begin as, what is refused, and a token that comes too early."""
    torch.set_num_threads(1)
    recipe = recipe_of(tmp_path, {"add_tokens": 16})
    assert check(recipe) == []
    rows = [stage_model(recipe, number).config["text_config"]["vocab_size"] for number in range(4)]
    assert rows == [448, 464, 464, 448]
    assert recipe_hash(stage_recipe(recipe, 1)) == recipe_hash(recipe)
    plan = make_plan(recipe)
    assert [stage.parameters["language"] - plan.stages[0].parameters["language"] for stage in plan.stages] == [0, 2048, 2048, 0]
    case = case_of("terrace_vlm", tmp_path)
    first, second = (stage_recipe(recipe, number).model for number in (0, 1))
    model = build_model(first, model_config(first, case.tokenizer))
    final = export_hf(dict(model.named_parameters()), model.config, case.tokenizer.directory, tmp_path / "final")
    grown = build_model(second, model_config(second, case.tokenizer), start=final, changes=recipe.stages[1].model_changes)
    old = dict(model.named_parameters())
    for name, parameter in grown.named_parameters():
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            torch.testing.assert_close(parameter[448:], old[name].mean(dim=0).expand(16, -1))
        assert torch.equal(parameter[: len(old[name])], old[name]), name
    # The tokenizer may have what another stage adds, and no more; a sample may not have it before.
    size = case.tokenizer.vocabulary_size
    few = {**CONFIGS["terrace_vlm"]["text_config"], "vocab_size": size - 10}
    narrow = recipe_of(tmp_path, {"add_tokens": 16}, {**CONFIGS["terrace_vlm"], "text_config": few})
    early = stage_recipe(narrow, 0).model
    assert model_config(early, case.tokenizer).text_config.vocab_size == size - 10
    with pytest.raises(InputError, match=f"the tokenizer has {size} tokens, .*{size - 10}"):
        model_config(narrow.model, case.tokenizer)
    example = pack_of(case, [conversation(1, [])])
    example.input_ids[3] = size - 1
    with pytest.raises(DamagedData, match=f"has the token {size - 1} and the model of this stage {size - 10} rows"):
        pack_hidden(build_model(early, model_config(early, case.tokenizer)), to_device(example, "cpu", torch.float32))
    values = recipe.model_dump(mode="json")
    values["stages"][1]["train"]["language"] = None
    frozen = Recipe.model_validate(values)
    assert ["which nothing trains in this stage" in str(problem) for problem in check(frozen)] == [True]
    trained = recipe_of(tmp_path, {"add_tokens": 16}, {**CONFIGS["terrace_vlm"], "text_config": WITHOUT})
    assert ["needs `vocab_size` in model.config" in str(problem) for problem in check(trained)] == [True]
