"""Two towers: the loss over the global batch is transformers' own, in value and gradient, for any packs, ranks and strategy."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import picture
from PIL import Image
from processes import run_ranks
from towers import ARCHITECTURES, assert_equal, gradients_of_step, gradients_of_steps, pair_pack, towers_model, towers_recipe, train_towers
from transformers import AutoImageProcessor, AutoModel

from terrace.data.images import load_pixels
from terrace.errors import Preempted
from terrace.models.batch import ImageFacts, image_facts
from terrace.models.families.registry import family_of_model
from terrace.models.parts import has_weight_decay, part_parameters
from terrace.objectives.chance import kept_patches
from terrace.objectives.retrieval import recalls
from terrace.planner.parameters import parameter_counts, part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.objectives import RETRIEVAL
from terrace.recipe.rules import check

DUAL = ("vision_text_dual_encoder", "clip_and_roberta")
CASES = {"clip": "clip", "siglip": "siglip", "siglip2": "siglip"} | dict.fromkeys(DUAL, "clip")  # family -> objective
PAIRS = 12
EXACT = {"siglip2": 1e-7}  # transformers resizes its positions in float32 whatever the precision


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def published_step(name, dtype):
    """The loss and the gradients of transformers' own forward over all pairs."""
    model, config = towers_model(name, dtype)
    family, pack = family_of_model(model), pair_pack(config, 0, PAIRS)
    ids, there = family.text_rows(np.split(pack.input_ids, pack.segment_ends[:-1]), config)
    pixels = family.inputs(family.normalised(torch.from_numpy(pack.pixels), dtype), image_facts(pack))
    mask = {"attention_mask": torch.from_numpy(there)} if name in DUAL else {}  # the other text towers look back alone, or see padding
    loss = model(input_ids=torch.from_numpy(ids), **mask, **pixels, return_loss=True).loss
    loss.backward()
    return float(loss.detach()), {key: np.zeros(1) if p.grad is None else p.grad.numpy() for key, p in model.named_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_transformers_own_whatever_the_packs(name):
    exact = published_step(name, torch.float64)
    for sizes in ([12], [4, 4, 4], [5, 7, 0], [1] * 12):
        assert_equal(gradients_of_step(0, 1, name, CASES[name], sizes), exact, EXACT.get(name, 1e-12))
    single = published_step(name, torch.float32)
    for sizes in ([12], [3, 3, 3, 3]):
        assert_equal(gradients_of_step(0, 1, name, CASES[name], sizes, "float32"), single, 2e-6)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_ranks_changes_nothing(ranks):
    """Also where a rank has fewer pairs than others, or none."""
    layouts = {2: ([6, 6], [3, 3, 3, 3], [5, 4, 3, 0], [7, 5, 0, 0]), 4: ([3, 3, 3, 3], [5, 7, 0, 0], [2, 1, 2, 1, 2, 1, 2, 1])}[ranks]
    cases = [(name, objective, sizes) for name, objective in (("clip", "clip"), ("siglip", "siglip")) for sizes in layouts]
    [found, *others] = run_ranks(ranks, gradients_of_steps, cases)
    for case, result in zip(cases, found):
        assert_equal(result, published_step(case[0], torch.float64), 1e-12)
    assert all(other[0][0] == found[0][0] for other in others)


def losses(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    [file] = sorted((Path(folder) / "final").glob("*.safetensors"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(next((Path(folder) / "final").glob("*.safetensors")))


def test_a_stage_stopped_and_resumed_ends_with_the_same_bits_and_exports_the_class(tmp_path):
    """FLIP's masks, LiT's frozen tower and a bound on the scale on the way; the export gives equal vectors."""
    frozen = {"language": {"lr": 1e-2}, "projector": {"lr": 5e-2}}
    recipes = {
        "clip": towers_recipe("clip", "clip", pairs={"masked_patches": 0.5, "highest_scale": 13.0}, checkpoint={"every_steps": 1}),
        "siglip": towers_recipe("siglip", "siglip", pairs={"masked_patches": 0.5}),
        "siglip2": towers_recipe("siglip2", "siglip"),
        "lit": towers_recipe("clip", "clip", train=frozen),
        "again": towers_recipe("clip", "clip", pairs={"masked_patches": 0.5, "highest_scale": 13.0}, checkpoint={"every_steps": 1}),
    }
    values = {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}
    again = {"again": values.pop("again")}
    train_towers(0, 1, values, str(tmp_path))
    with pytest.raises(Preempted):
        train_towers(0, 1, again, str(tmp_path), stop_after=2)
    train_towers(0, 1, again, str(tmp_path))
    assert weights(tmp_path / "again") == weights(tmp_path / "clip")
    assert losses(tmp_path / "again") == losses(tmp_path / "clip")
    scale = float(tensors(tmp_path / "clip")["logit_scale"])
    assert np.log(12.0) < scale <= np.log(13.0) + 1e-6, "from log(1/0.07) it would not have come as far"
    start, lit = towers_model("clip")[0].state_dict(), tensors(tmp_path / "lit")
    assert all(torch.equal(lit[name], start[name]) for name in lit if name.startswith("vision_model."))
    assert not torch.equal(lit["text_projection.weight"], start["text_projection.weight"])
    result = json.loads((tmp_path / "clip" / "result.json").read_text())["evaluation"]
    assert set(result["after"]) == {f"caption/{figure}" for figure in RETRIEVAL}
    for name, family in (("clip", "clip"), ("siglip", "siglip"), ("siglip2", "siglip2")):
        loaded, told = AutoModel.from_pretrained(tmp_path / name / "final", output_loading_info=True)
        assert type(loaded).__name__ == {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}[family]
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        config, helper = loaded.config, family_of_model(loaded)
        held_out = [pair_pack(config, 900 + place, 4) for place in range(3)]
        found = []
        for pack in held_out:
            ids, _ = helper.text_rows(np.split(pack.input_ids, pack.segment_ends[:-1]), config)
            pixels = helper.inputs(helper.normalised(torch.from_numpy(pack.pixels), torch.float32), image_facts(pack))
            with torch.no_grad():
                out = loaded.eval()(input_ids=torch.from_numpy(ids), **pixels)
            found.append(torch.stack([out.image_embeds, out.text_embeds], 1))
        images, texts = torch.cat(found).unbind(1)
        measured = json.loads((tmp_path / name / "result.json").read_text())["evaluation"]["after"]
        assert measured["caption/image_to_text_r1"] == pytest.approx(recalls(images, texts, range(12))["image_to_text_r1"])


@pytest.mark.slow
def test_every_kind_of_towers_resumes_to_the_same_bits(tmp_path):
    """After one, two and three steps of four."""
    values = {
        f"{name} {objective}": towers_recipe(name, objective, checkpoint={"every_steps": 1}).model_dump(mode="json")
        for name in ("clip", "siglip", "siglip2") for objective in ("clip", "siglip")
    }  # fmt: skip
    train_towers(0, 1, values, str(tmp_path / "whole"))
    for name, value in values.items():
        for _ in range(3):
            with pytest.raises(Preempted):
                train_towers(0, 1, {name: value}, str(tmp_path / "killed"), stop_after=1)
        train_towers(0, 1, {name: value}, str(tmp_path / "killed"))
        assert weights(tmp_path / "killed" / name) == weights(tmp_path / "whole" / name), name
        assert losses(tmp_path / "killed" / name) == losses(tmp_path / "whole" / name), name


LAYOUTS = {"ddp": 2, "fsdp": 2, "zero2": 2, "zero3": 2, "ddp on four": 4}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_strategy_and_number_of_ranks_gives_the_losses_of_one_process(layout, tmp_path):
    """Two ranks with two packs each (two passes), four with one each (one pass)."""
    strategy, ranks = layout.split()[0], LAYOUTS[layout]
    options = {"budget": {"steps": 3}, "pairs": {"masked_patches": 0.25}, "evaluate": {"max_samples_per_kind": 4}}
    recipes = {
        name: towers_recipe(name, name, parallel={"strategy": strategy}, **options).model_dump(mode="json") for name in ("clip", "siglip")
    }
    train_towers(0, 1, {name: towers_recipe(name, name, **options).model_dump(mode="json") for name in recipes}, str(tmp_path / "1"))
    run_ranks(ranks, train_towers, recipes, str(tmp_path / "n"), timeout=1500)
    for name in recipes:
        np.testing.assert_allclose(losses(tmp_path / "n" / name), losses(tmp_path / "1" / name), rtol=1e-5, err_msg=name)
        straight = tensors(tmp_path / "1" / name)
        for key, tensor in tensors(tmp_path / "n" / name).items():
            assert tensor.shape == straight[key].shape, key
            # Adam divides by the root of the squares: where a gradient is rounding alone (a key's bias), so is its step
            if not key.endswith(("k_proj.bias", "in_proj_bias")):
                torch.testing.assert_close(tensor, straight[key], rtol=1e-3, atol=2e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("name", CASES)
def test_a_family_of_two_towers_counts_freezes_starts_and_cuts_as_its_class_does(name, tmp_path):
    model, config = towers_model(name)
    shape, family = shape_of_config(config.to_dict(), ARCHITECTURES.get(name, name)), family_of_model(model)
    maps = CASES[name] == "clip"
    parts = part_parameters(model)
    assert parameter_counts(shape) == {part: sum(p.numel() for _, p in pairs) for part, pairs in parts.items()}
    assert sorted(n for n, _ in parts["projector"]) == sorted(
        ["logit_scale", *(["visual_projection.weight", "text_projection.weight"] if maps else ["logit_bias"])]
    )
    for part in ("vision", "language"):
        assert part_sizes(shape)[part].block == sum(p.numel() for p in family.blocks_of(model, part)[0].parameters())
    undecayed = {key for key, _ in model.named_parameters() if not has_weight_decay(key)}
    assert {key for key, p in model.named_parameters() if p.dim() < 2} <= undecayed
    # Random weights are drawn as the class draws them, the temperature is the published one.
    torch.manual_seed(0)
    for (key, ours), theirs in zip(model.named_parameters(), AutoModel.from_config(config).parameters()):
        if ours.numel() > 64:
            assert float(ours.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.35), key
    assert float(model.logit_scale.detach()) == pytest.approx(np.log(1 / 0.07) if maps else np.log(10), abs=1e-4)
    assert maps or float(model.logit_bias.detach()) == -10
    # Pictures are those of the published processor, of which the export tells the settings.
    bounds = (1, 3_136)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(family.family.preprocessor(bounds)))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((90, 40), (33, 120), (28, 28), (56, 61)):
        data = picture(*size)
        view = family.family.view(*size, bounds)
        rows = torch.from_numpy(load_pixels(data, family.family, view))
        assert len(rows) == view.rows
        images = ImageFacts(torch.tensor([view.facts]), torch.tensor([view.tokens]), torch.tensor([view.rows]))
        ours = family.inputs(family.normalised(rows, torch.float32), images)
        theirs = processor([Image.open(io.BytesIO(data))], return_tensors="pt")
        if name == "siglip2":
            assert theirs["spatial_shapes"].tolist() == images.facts.tolist()
            theirs["pixel_values"] = theirs["pixel_values"][:, : view.rows]
        assert float((ours["pixel_values"] - theirs["pixel_values"]).abs().mean()) < 0.02, size


def test_a_recipe_says_what_fits_together():
    def problems(recipe):
        return [str(problem) for problem in check(recipe)]

    assert problems(towers_recipe("clip", "clip")) == []
    assert any("lm trains a model that writes text" in line and "clip or siglip" in line for line in problems(towers_recipe("clip", "lm")))
    assert any("more than the 16 positions" in line for line in problems(towers_recipe("clip", "clip", sequence_length=77)))
    assert any("steps, samples or epochs" in line for line in problems(towers_recipe("siglip", "siglip", budget={"tokens": 1e4})))
    from packs import tiny_recipe

    told = problems(tiny_recipe(objective="clip"))
    assert any("gives vectors of pictures and of texts (clip, siglip, siglip2, vision_text_dual_encoder)" in line for line in told)
    broken = towers_recipe("siglip", "siglip").model_dump(mode="json")
    broken["model"]["config"]["vision_config"]["hidden_size"] = 64
    assert any("needs `projection_size` 64" in line for line in problems(type(towers_recipe("clip", "clip")).model_validate(broken)))


def test_masks_depend_on_seed_sample_and_epoch_alone_and_recalls_count_the_same_caption_as_right():
    whole = kept_patches(3, ["a"] * 4, ["w", "x", "y", "z"], [0, 0, 0, 0], 49, 12)
    assert np.array_equal(whole[2:], kept_patches(3, ["a"] * 2, ["y", "z"], [0, 0], 49, 12))
    assert all(len(set(row.tolist())) == 12 for row in whole)
    for other in (kept_patches(4, ["a"], ["w"], [0], 49, 12), kept_patches(3, ["a"], ["w"], [1], 49, 12), whole[1:2]):
        assert not np.array_equal(other, whole[:1])
    texts = torch.nn.functional.normalize(torch.eye(4)[[0, 1, 2, 0]] + 0.01, dim=1)
    images = torch.nn.functional.normalize(torch.eye(4)[[0, 1, 1, 0]] + 0.02, dim=1)
    found = recalls(images, texts, ["p", "q", "r", "p"])
    assert found["image_to_text_r1"] == pytest.approx(3 / 4)
    assert found["text_to_image_r1"] == pytest.approx(1 / 3), "q is as near to another picture as to its own"
    assert recalls(torch.ones(20, 2), torch.ones(20, 2), range(20))["image_to_text_r10"] == 0.0
