"""Low-rank adapters: the losses of peft's own model, every strategy, exact resumes, the base bit for bit, exports that peft loads."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import NAMES, case_of, recipe_model
from family_ranks import family_pack, family_recipe
from packs import tiny_recipe
from processes import run_ranks
from ranks import losses, packs_of_step, stage_dir, train_each, train_stages
from safetensors.torch import load_file
from traced import Traced
from transformers import AutoModelForImageTextToText

from terrace.models import compiled
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, meta_model, model_config
from terrace.models.lora import adapted_source, add_lora, is_adapter, lora_targets
from terrace.models.parts import part_parameters
from terrace.models.weights import Directory, random_source
from terrace.objectives.lm import summed_loss
from terrace.planner.adapters import with_adapters
from terrace.planner.parameters import trainable_counts
from terrace.planner.shapes import shape_of_config
from terrace.recipe.rules import check
from terrace.train.optimizer import parameter_groups
from terrace.train.setup import freeze_parts

LORA = {
    "language": {"lr": 5e-3, "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "mlp.up_proj"]}},
    "projector": {"lr": 1e-3},
}


def two_stages(strategy: str = "ddp", dropout: float = 0.0, keep: bool = False, **changes):
    """Adapters of the language model beside a projector that trains whole, and a second stage with adapters again."""
    first = json.loads(json.dumps(LORA))
    first["language"]["lora"]["dropout"] = dropout
    second = json.loads(json.dumps({part: first[part] for part in (("projector", "language") if keep else ("language",))}))
    second["language"]["optimizer_state"] = "keep" if keep else "reset"
    common = {"parallel": {"strategy": strategy}, "checkpoint": {"every_steps": 1, "keep_last": 9}, **changes}
    return tiny_recipe([
        {"name": "adapt", "train": first, "budget": {"steps": 3}, **common},
        {"name": "again", "train": second, "budget": {"steps": 3}, **common},
    ])  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    directory = Directory(folder)
    return {name: directory.read(name) for name in sorted(directory.names)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lora")
    train_stages(0, 1, two_stages().model_dump(mode="json"), str(folder))
    return folder


def test_the_losses_are_those_of_peft_s_own_model_in_a_written_out_loop(reference):
    from peft import LoraConfig, get_peft_model

    recipe = two_stages()
    stage = recipe.stages[0]
    model = build_model(recipe.model, model_config(recipe.model))
    use_attention(model, "sdpa_segments")
    own = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)")
    adapted = get_peft_model(model, own)
    skeleton = meta_model(model_config(recipe.model))
    source = random_source(skeleton, recipe.model.seed)
    add_lora(skeleton, stage)
    source = adapted_source(skeleton, source, stage.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(source(name))  # A is drawn here by name
    projector = [parameter for _, parameter in part_parameters(model)["projector"]]
    for parameter in projector:
        parameter.requires_grad_(True)
    low_rank = [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
    assert len(low_rank) == 2 * 2 * 3
    vectors = [parameter for parameter in projector if parameter.dim() == 1]
    matrices = [parameter for parameter in projector if parameter.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": low_rank, "lr": 5e-3}, {"params": matrices, "lr": 1e-3}, {"params": vectors, "lr": 1e-3, "weight_decay": 0.0}],
        betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    found = []
    for step in range(3):
        packs = packs_of_step(step, 4)
        count = sum(pack.supervised_tokens for pack in packs)
        total = 0.0
        for pack in packs:
            loss = summed_loss(adapted.base_model.model, to_device(pack, "cpu", torch.float32), 32) / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_([*low_rank, *projector], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    np.testing.assert_allclose(losses(reference, 0), found, rtol=1e-6)


def test_the_base_stays_bit_for_bit_and_peft_loads_what_is_exported(reference):
    from peft import PeftModel

    recipe = two_stages()
    start = build_model(recipe.model, model_config(recipe.model))
    final = stage_dir(reference, 0) / "final"
    merged, base = tensors(final), tensors(final / "adapter" / "base")
    targets = set(lora_targets(start, recipe.stages[0]))
    for name, parameter in start.named_parameters():
        changed = name.removesuffix(".weight") in targets
        in_projector = any(name == other for other, _ in part_parameters(start)["projector"])
        assert torch.equal(base[name], parameter) != in_projector
        assert torch.equal(merged[name], base[name]) != changed
    # The checkpoint's own base tensors are those bits too.
    saved = load_file(sorted((stage_dir(reference, 0) / "checkpoints" / "step-000003").glob("weights-*"))[0])
    for name in targets:
        assert torch.equal(saved[f"{name}.base_layer.weight"], dict(start.named_parameters())[f"{name}.weight"])
    # The second stage trains nothing but adapters: its base is the first one's directory, and nothing is copied.
    second = stage_dir(reference, 1) / "final"
    told = json.loads((second / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(final.absolute())
    assert not (second / "adapter" / "base").exists()
    ids = torch.arange(5, 25)[None]
    for folder in (final, second):
        settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        plain = AutoModelForImageTextToText.from_pretrained(settings["base_model_name_or_path"], dtype=torch.float32)
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected, without = (model.eval()(input_ids=ids).logits for model in (whole, plain))
            loaded = PeftModel.from_pretrained(plain, folder / "adapter").eval()
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
            assert float((expected - without).abs().max()) > 1e-3


def test_a_stopped_stage_goes_on_bit_for_bit_with_dropout_and_adapters_of_before_are_kept(tmp_path):
    """The second stage keeps adapters and their moments: both stages together are one stage of six steps."""
    torch.set_num_threads(1)
    recipe = two_stages(dropout=0.3, keep=True)
    assert not [problem for problem in check(recipe) if "lora" in str(problem) or "optimizer_state" in str(problem)]
    whole = tmp_path / "whole"
    train_stages(0, 1, recipe.model_dump(mode="json"), str(whole))
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(stage_dir(cut, 1) / "final")
    (stage_dir(cut, 1) / "result.json").unlink()
    for step in (2, 3):
        shutil.rmtree(stage_dir(cut, 1) / "checkpoints" / f"step-{step:06d}")
    train_stages(0, 1, recipe.model_dump(mode="json"), str(cut), first=1)
    for name, tensor in tensors(stage_dir(whole, 1) / "final").items():
        assert torch.equal(tensor, tensors(stage_dir(cut, 1) / "final")[name]), name
    first, second = (load_file(next((stage_dir(whole, index) / "checkpoints").glob("step-000001/weights-*"))) for index in (0, 1))
    ups = [name for name in first if ".lora_A." in name]
    last = load_file(next((stage_dir(whole, 0) / "checkpoints").glob("step-000003/weights-*")))
    moved = {name: float((second[name] - last[name]).abs().max()) for name in ups}
    assert max(moved.values()) < 0.02  # one step from where the first stage ended, not a new draw
    assert all(torch.equal(first[name], second[name]) for name in first if ".base_layer." in name)
    changed = recipe.model_copy(update={"stages": [recipe.stages[0], two_stages(keep=True).stages[1]]})
    assert any("goes on with the adapters of stage `adapt`" in str(problem) for problem in check(changed))


@pytest.mark.slow
def test_two_ranks_of_any_strategy_equal_one_process(tmp_path, reference):
    recipes = {name: two_stages(name).model_dump(mode="json") for name in ("ddp", "fsdp", "zero1", "zero2", "zero3")}
    run_ranks(2, train_each, recipes, str(tmp_path), timeout=600)
    expected = tensors(stage_dir(reference, 1) / "final")
    for name in recipes:
        for index in (0, 1):
            np.testing.assert_allclose(losses(tmp_path / name, index), losses(reference, index), rtol=1e-5, err_msg=name)
        for tensor, value in tensors(stage_dir(tmp_path / name, 1) / "final").items():
            assert float((value - expected[tensor]).abs().max()) < 1e-4, (name, tensor)
    bf16 = {name: two_stages(name, precision="bf16").model_dump(mode="json") for name in recipes}
    run_ranks(2, train_each, bf16, str(tmp_path / "bf16"), timeout=600)
    for name in recipes:
        for index in (0, 1):
            np.testing.assert_allclose(losses(tmp_path / "bf16" / name, index), losses(reference, index), rtol=2e-2, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kernels", [False, True])
def test_compiled_blocks_with_adapters_train_the_same(tmp_path, monkeypatch, kernels, dropout):
    """Both stages, the second on top of the first one's merged weights. Kernels draw other numbers for dropout: there losses are near."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    monkeypatch.setattr(compiled.GRAPHS, "__class__", compiled.Graphs if kernels else Traced)
    before = compiled.GRAPHS.count
    for way in ("plain", "compiled"):
        recipe = two_stages(dropout=dropout, parallel={"strategy": "ddp", "compile": way == "compiled"})
        train_stages(0, 1, recipe.model_dump(mode="json"), str(tmp_path / way))
    assert compiled.GRAPHS.count > before
    same = dropout == 0.0 or not kernels
    for index in (0, 1):
        expected = losses(tmp_path / "plain", index)
        np.testing.assert_allclose(losses(tmp_path / "compiled", index), expected, rtol=1e-5 if same else 0.05)
    ours, theirs = (tensors(stage_dir(tmp_path / way, 1) / "final") for way in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    if same:
        assert all(float((ours[name] - tensor).abs().max()) < 1e-4 for name, tensor in theirs.items())


BARE = (("gemma3", "projector"),)  # whose matrices stand outside of linear layers: it trains whole beside the others' adapters


@pytest.mark.parametrize("name", [name if name == "qwen2_5_vl" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_every_family_adapts_every_part_with_a_gradient_and_a_plan_that_counts_it(name, tmp_path):
    """Every adapted layer gets a gradient; parameters are exact; parts of different ranks become one adapter that peft loads."""
    torch.set_num_threads(1)
    case = case_of(name, tmp_path)
    recipe = family_recipe(name, "ddp")
    values = recipe.model_dump(mode="json")
    for part, rank in {"vision": 2, "projector": 3, "language": 4}.items():
        if part not in case.family.trainable() or (name, part) in BARE:
            continue
        values["stages"][0]["train"][part]["lora"] = {"rank": rank, "alpha": 8, "rank_stabilised": part == "vision"}
    recipe = type(recipe).model_validate(values)
    stage = recipe.stages[0]
    model = meta_model(case.config)
    source = random_source(model, 0)
    add_lora(model, stage)
    source = adapted_source(model, source, 0)
    freeze_parts(model, stage)
    counted = {part: sum(p.numel() for _, p in pairs if p.requires_grad) for part, pairs in part_parameters(model).items()}
    shape = with_adapters(shape_of_config(case.config.to_dict(), name), stage, recipe.model, case.config)
    assert trainable_counts(shape, stage) == counted
    assert {part for part, count in counted.items() if count} == set(case.family.trainable())
    named = list(itertools.chain.from_iterable(group.names for group in parameter_groups(model, stage)))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(named) == sorted(trained)
    from terrace.models.build import materialise

    model = materialise(model, source, "cpu")
    use_attention(model, "sdpa_segments")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            shut = parameter_name.endswith(("mm_input_projection_weight", "gate", "gate_attn", "gate_ffn"))  # begun as zeros
            if is_adapter(parameter_name) or shut:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    summed_loss(model, to_device(family_pack(case, 1, True), "cpu", torch.float32), 64).backward()
    silent = (".layer.1.intermediate.", ".layer.1.output.") if name == "instructblip" else ()  # a Q-Former's last words are read by nobody
    heard = [parameter for key, parameter in model.named_parameters() if not any(words in key for words in silent)]
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in heard if parameter.requires_grad)
    # Export by hand: merged and, filled up to one rank, unmerged.
    from peft import PeftModel

    from terrace.models.export import export_hf
    from terrace.models.lora import merged, split, write_adapter

    state = {key: value.detach() for key, value in model.named_parameters()}
    base, adapters = split(state)
    export_hf(base, case.config, None, tmp_path / "base")
    export_hf(dict(merged(model, state.items())), case.config, None, tmp_path / "merged")
    write_adapter(model, adapters, str(tmp_path / "base"), tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    alpha = 8 if case.family.trainable() == ("language",) else 4  # of one part alone: as written
    assert (told["r"], told["lora_alpha"], told["use_rslora"], told["rank_pattern"]) == (4, alpha, False, {})
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    whole = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).named_parameters())
    for key, value in loaded.named_parameters():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-6)


def test_targets_that_no_layer_has_are_named(tmp_path):
    recipe = tiny_recipe(train={"language": {"lr": 1e-3, "lora": {"targets": ["q_proj", "v_prj"]}}})
    with pytest.raises(Exception, match=r"no linear layer of language is named `v_prj`.*v_proj"):
        lora_targets(meta_model(model_config(recipe.model)), recipe.stages[0])
    recipe = tiny_recipe(
        model=recipe_model("qwen3_vl_moe"), train={"language": {"lr": 1e-3, "lora": {"targets": ["q_proj", "experts.gate_up_proj"]}}}
    )
    case = case_of("qwen3_vl_moe", tmp_path)
    with pytest.raises(Exception, match=r"`experts.gate_up_proj` is one tensor for all experts \(.*mlp.experts.gate_up_proj\)"):
        lora_targets(meta_model(case.config), recipe.stages[0])
