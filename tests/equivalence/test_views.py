"""Objectives over views: value and gradients are the formula's, for any packs and ranks; what they remember resumes to the same bits."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import run_ranks
from safetensors.torch import load_file
from transformers import ViTModel
from view_stages import CASES, gradients_of_step, gradients_of_steps, learner_of, train_views, views_recipe

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.look.inspect_page import inspection_page
from terrace.data.look.samples import inspect_stage
from terrace.data.prepare import prepare_data
from terrace.data.views.plans import plan_views
from terrace.models.families.registry import family_of_model
from terrace.planner.parameters import head_parameters
from terrace.planner.shapes import shape_of_config
from terrace.planner.views import seen_patches, teacher_parameters
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

# ---------------------------------------------------------------- the formulas, written out


def head(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A projector or predictor on rows [N, W], layer by layer."""
    for layer in module:
        kind = type(layer).__name__
        if kind in ("HeadLinear", "SmallLinear"):
            x = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        elif kind in ("BatchNorm", "LayerNorm"):
            axis = 0 if kind == "BatchNorm" else 1
            x = (x - x.mean(axis, keepdim=True)) / (x.var(axis, keepdim=True, unbiased=False) + layer.eps).sqrt()
            x = x if layer.weight is None else x * layer.weight + layer.bias
        else:
            x = {"ReLU": torch.relu, "GELU": F.gelu}[kind](x)
    return x


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def cross(wanted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return -(wanted * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1)


def formula(case: str, learner: Any, views: list[torch.Tensor], keys: list[int]) -> torch.Tensor:
    """The mean loss of one batch of all pictures."""
    model, count = learner.strategy.model, len(views[0])
    heads = model.heads
    tower = family_of_model(model).view_features
    z = [head(heads.projector, tower(model, view)) for view in views]
    if learner.teacher is not None:
        with torch.no_grad():
            t = [head(learner.teacher.model.heads.projector, tower(learner.teacher.model, view)) for view in views]
    total: Any = 0.0
    if case == "simclr":
        rows = [unit(x[i]) for x in z for i in range(count)]
        for i, row in enumerate(rows):
            logits = torch.stack([row @ other / 0.1 for j, other in enumerate(rows) if j != i])
            total += 0.5 * (torch.log(torch.exp(logits).sum()) - row @ rows[(i + count) % (2 * count)] / 0.1)
    elif case == "moco-v2":
        for q, k in zip(unit(z[0]), unit(t[1])):
            logits = torch.cat([(q @ k)[None], learner.kept["queue"].double() @ q]) / 0.2
            total += cross(torch.eye(21)[0], logits)
    elif case == "moco-v3":
        for first, second in ((0, 1), (1, 0)):
            queries, wanted = unit(head(heads.predictor, z[first])), unit(t[second])
            total += 0.4 * F.cross_entropy(queries @ wanted.T / 0.2, torch.arange(count), reduction="sum")
    elif case == "byol":
        for first, second in ((0, 1), (1, 0)):
            total += (unit(head(heads.predictor, z[first])) - unit(t[second])).square().sum()
    elif case.startswith("simsiam"):
        for first, second in ((0, 1), (1, 0)):
            total += -0.5 * F.cosine_similarity(head(heads.predictor, z[first]), z[second].detach()).sum()
    elif case == "dino":
        s = [unit(x) @ unit(heads.prototypes.weight.detach()).T / 0.1 for x in z]  # frozen in the first step
        p = [((unit(x) @ unit(learner.teacher.model.heads.prototypes.weight).T - learner.kept["centre"]) / 0.04).softmax(-1) for x in t[:2]]
        pairs = [(a, b) for a in range(2) for b in range(4) if a != b]
        total = sum(cross(p[a], s[b]).sum() for a, b in pairs) / len(pairs)
    elif case == "swav":
        s = [unit(x) @ unit(heads.prototypes.weight).T for x in z]
        codes = []
        for scores in s[:2]:
            q = np.exp(scores.detach().numpy() / 0.05).T
            q /= q.sum()
            for _ in range(3):
                q /= q.sum(1, keepdims=True) * len(q)
                q /= q.sum(0, keepdims=True) * count
            codes.append(torch.from_numpy(q.T * count))
        pairs = [(a, b) for a in range(2) for b in range(3) if a != b]
        total = sum(cross(codes[a], s[b] / 0.1).sum() for a, b in pairs) / len(pairs)
    elif case == "instance_discrimination":
        known = learner.kept["keys"].tolist()
        for x, key in zip(unit(z[0]), keys):
            total += cross(torch.eye(len(known))[known.index(key)], learner.kept["bank"].double() @ x / 0.07)
    else:  # cpc, 3 by 3 squares
        cells = torch.stack(z, 1).view(count, 3, 3, 8)
        gru, every = heads.context, cells.reshape(-1, 8)
        for n in range(count):
            for j in range(3):
                c = torch.zeros(10, dtype=every.dtype)
                for i in range(2):
                    (r, u, g), (r2, u2, g2) = (
                        (weight @ x + bias).chunk(3)
                        for weight, bias, x in (
                            (gru.weight_ih_l0, gru.bias_ih_l0, cells[n, i, j]), (gru.weight_hh_l0, gru.bias_hh_l0, c)
                        )
                    )  # fmt: skip
                    gate = torch.sigmoid(u + u2)
                    c = (1 - gate) * torch.tanh(g + torch.sigmoid(r + r2) * g2) + gate * c
                    for k in (1, 2):
                        if i + k < 3:
                            logits = every @ (heads.maps.weight[(k - 1) * 8 : k * 8] @ c)
                            total += (logits.logsumexp(0) - logits[n * 9 + (i + k) * 3 + j]) / 9
    return total / count


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_the_formula_s_in_any_packs(case):
    torch.set_num_threads(1)
    learner = learner_of(case, [12])
    [taken, *_] = learner.steps(0)
    learner.step = 0
    learner.before(taken.examples, 1 / 12)
    batch = learner.batch(taken.examples[0])
    wanted = formula(case, learner, list(batch.views), batch.keys.tolist())
    wanted.backward()
    value, found = gradients_of_step(0, 1, case, [12])
    chunked, in_packs = gradients_of_step(0, 1, case, [5, 3, 0, 4])
    short, in_float32 = gradients_of_step(0, 1, case, [6, 6], "float32")
    assert value == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert chunked == pytest.approx(value, rel=1e-12)
    assert short == pytest.approx(value, rel=2e-6, abs=2e-6)
    for name, parameter in learner.strategy.model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        np.testing.assert_allclose(found[name], gradient.numpy(), rtol=1e-7, atol=1e-10, err_msg=name)
    largest = max(float(np.abs(g).max()) for name, g in found.items() if "." in name)
    for name, gradient in found.items():
        np.testing.assert_allclose(in_packs[name], gradient, rtol=1e-7, atol=1e-9, err_msg=name)
        if "." in name and "state" not in name:
            assert float(np.abs(in_float32[name] - gradient).max()) < 5e-6 * largest, name
    model, [stage] = learner.strategy.model, learner.opening.recipe.stages
    shape = shape_of_config(model.config.to_dict(), "vit")
    planned = sum(patches for patches, share in seen_patches(stage, shape) if share == 1)
    assert planned == sum((view.shape[-1] // 4) ** 2 for view in batch.views[: 1 if case == "moco-v2" else None])
    taught = len(learner.teacher_views()) * 16 / 3
    assert sum(patches * share for patches, share in seen_patches(stage, shape)) == pytest.approx(planned + taught)
    if learner.teacher is not None:
        held = sum(tensor.numel() for tensor in learner.teacher.tensors.values())
        predictor = model.heads.predictor
        assert teacher_parameters(shape, stage) == held + (sum(p.numel() for p in predictor.parameters()) if predictor else 0)
    assert head_parameters(shape, stage) == sum(p.numel() for p in model.heads.parameters())


def test_what_a_step_leaves_behind():
    """The queue has the newest keys at its end, the centre and the bank follow their shares, the teacher follows the student."""
    torch.set_num_threads(1)

    def after(case: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        learner = learner_of(case, [4, 4])
        [taken, *_] = learner.steps(0)
        learner.step = 0
        learner.before(taken.examples, 1.0)
        before = {name: tensor.clone() for name, tensor in learner.state()}
        batches = [learner.batch(example) for example in taken.examples]
        for batch in batches:
            learner.strategy.accumulate(batch, 1.0)
        learner.values(True)
        learner.after_step(1)
        views = [torch.cat(pair) for pair in zip(*(batch.views for batch in batches))]
        return learner, before, {"state": dict(learner.state()), "views": views, "keys": torch.cat([batch.keys for batch in batches])}

    learner, before, now = after("moco-v2")
    teacher = learner_of("moco-v2", [8]).teacher.model
    keys = unit(head(teacher.heads.projector, family_of_model(teacher).view_features(teacher, now["views"][1])))
    torch.testing.assert_close(now["state"]["queue"][:12], before["queue"][8:])
    torch.testing.assert_close(now["state"]["queue"][12:], keys.float())
    name = "layers.0.mlp.fc1.weight"
    student = dict(learner.strategy.model.named_parameters())[name]
    torch.testing.assert_close(now["state"][f"teacher.{name}"], 0.9 * before[f"teacher.{name}"] + 0.1 * student)
    learner, before, now = after("dino")
    teacher = learner_of("dino", [8]).teacher.model
    features = torch.stack([family_of_model(teacher).view_features(teacher, view) for view in now["views"][:2]])
    cosines = unit(head(teacher.heads.projector, features.flatten(0, 1))) @ unit(teacher.heads.prototypes.weight).T
    torch.testing.assert_close(now["state"]["centre"], (0.1 * cosines.mean(0)).float())
    learner, before, now = after("instance_discrimination")
    vectors = unit(learner.strategy.model.heads.projector(family_of_model(learner.strategy.model).view_features(
        learner.strategy.model, now["views"][0])))  # fmt: skip
    assert now["state"]["keys"].tolist() == now["keys"].tolist() == before["keys"].tolist()
    torch.testing.assert_close(now["state"]["bank"], unit(0.5 * before["bank"] + 0.5 * vectors.detach().float()))


# ---------------------------------------------------------------- ranks and stages


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_what_one_process_gives(ranks):
    """Loss, gradients, and what a step leaves behind; also where one rank holds fewer pictures or none."""
    torch.set_num_threads(1)
    cases = [(case, sizes) for case in CASES for sizes in ([3, 3, 3, 3], [5, 3, 0, 4])]
    whole = {case: gradients_of_step(0, 1, case, [12] if case.startswith("s") else [6, 6]) for case in CASES}
    for answers in run_ranks(ranks, gradients_of_steps, cases, timeout=600):
        for (case, sizes), (loss, found) in zip(cases, answers):
            value, wanted = whole[case]
            assert loss == pytest.approx(value, rel=1e-12), (case, sizes)
            for name, gradient in wanted.items():
                np.testing.assert_allclose(found[name], gradient, rtol=1e-7, atol=1e-9, err_msg=f"{case} {sizes} {name}")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def prints(folder: Path) -> dict[str, str]:
    files = [*(folder / "final").rglob("*.safetensors"), *sorted(folder.glob("checkpoints/*/objective*.safetensors"))[-1:]]
    return {file.name + str(place): hashlib.sha256(file.read_bytes()).hexdigest() for place, file in enumerate(files)}


def check_resume_and_export(tmp_path: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    values = {case: views_recipe(case, checkpoint={"every_steps": 1}).model_dump(mode="json") for case in cases}
    train_views(0, 1, values, str(tmp_path / "whole"))
    for value in values.values():  # nor does it matter that held-out pictures are judged between two steps
        value["stages"][0]["evaluate"]["every_steps"] = 1
    for case in cases:
        with pytest.raises(Exception, match="told to stop"):
            train_views(0, 1, {case: values[case]}, str(tmp_path / "killed"), stop_after=3)
    train_views(0, 1, values, str(tmp_path / "killed"))
    for case in cases:
        whole = tmp_path / "whole" / case
        assert prints(tmp_path / "killed" / case) == prints(whole), case
        told = json.loads((whole / "result.json").read_text())["evaluation"]
        assert told == json.loads((tmp_path / "killed" / case / "result.json").read_text())["evaluation"]
        assert 0 <= told["after"]["picture/spread"] <= 1
        assert ("picture/loss" in told["after"]) == (case != "instance_discrimination")
        loaded, missing = ViTModel.from_pretrained(whole / "final", add_pooling_layer=False, output_loading_info=True)
        assert not missing["missing_keys"]
        assert not missing["unexpected_keys"]
        heads = load_file(whole / "final" / "heads" / "model.safetensors")
        assert "projector.0.weight" in heads
        assert loaded.config.image_size == 16


def test_a_stage_resumes_to_the_same_bits_and_exports_its_tower(tmp_path):
    check_resume_and_export(tmp_path, ["dino", "moco-v2", "swav"])


@pytest.mark.slow
def test_every_stage_resumes_to_the_same_bits_and_exports_its_tower(tmp_path):
    check_resume_and_export(tmp_path, [case for case in CASES if case not in ("dino", "moco-v2", "swav")])


@pytest.mark.slow
def test_in_bfloat16_weights_that_are_split_train_as_well(tmp_path):
    torch.set_num_threads(1)
    cases = ("dino", "swav", "moco-v3", "cpc")
    plain = {"optimizer": {"kind": "sgd", "momentum": 0.9}, "budget": {"steps": 2}}
    train_views(0, 1, {case: views_recipe(case, **plain).model_dump(mode="json") for case in cases}, str(tmp_path / "one"))
    for strategy in ("ddp", "fsdp"):
        short = {
            case: views_recipe(case, **plain, precision="bf16", parallel={"strategy": strategy}).model_dump(mode="json") for case in cases
        }
        run_ranks(2, train_views, short, str(tmp_path / strategy), timeout=600)
        for case in cases:
            np.testing.assert_allclose(losses(tmp_path / strategy / case), losses(tmp_path / "one" / case), rtol=0.2, err_msg=case)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_two_ranks_under_every_strategy_give_the_losses_of_one(strategy, tmp_path):
    torch.set_num_threads(1)
    # Without Adam, which makes whole steps of gradients that are zero but for rounding (biases before a norm).
    plain = {"optimizer": {"kind": "sgd", "momentum": 0.9}}
    one = {case: views_recipe(case, **plain).model_dump(mode="json") for case in CASES}
    two = {case: views_recipe(case, **plain, parallel={"strategy": strategy}).model_dump(mode="json") for case in CASES}
    train_views(0, 1, one, str(tmp_path / "one"))
    run_ranks(2, train_views, two, str(tmp_path / "two"), timeout=600)
    for case in CASES:
        np.testing.assert_allclose(losses(tmp_path / "two" / case), losses(tmp_path / "one" / case), rtol=1e-4, atol=1e-5, err_msg=case)


def test_pictures_of_a_source_train_in_any_packs_and_their_views_can_be_looked_at(tmp_path):
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    (tmp_path / "pictures").mkdir()
    for number in range(16):
        Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    recipe = views_recipe("dino", budget={"epochs": 1.5}, batch={"packs": 3, "samples_per_pack": 2})
    source = {"uri": str(tmp_path / "pictures"), "kind": "picture", "holdout_samples": 4}
    recipe = Recipe.model_validate(recipe.model_dump() | {"data": {"sources": {"pictures": source}}})
    assert check(recipe) == []
    prepared = prepare_data(recipe, tmp_path / "run", use_ray=False)
    run_stage(recipe, 0, tmp_path / "run", 1, WorkerContext())
    shutil.copytree(tmp_path / "run", tmp_path / "other", ignore=shutil.ignore_patterns("stages"))
    [stage] = recipe.stages
    batch = stage.batch.model_copy(update={"packs": 1, "samples_per_pack": 6})
    run_stage(recipe.model_copy(update={"stages": [stage.model_copy(update={"batch": batch})]}), 0, tmp_path / "other", 1, WorkerContext())
    found = losses(tmp_path / "run" / "stages" / "01-one")
    assert len(found) == 3
    np.testing.assert_allclose(losses(tmp_path / "other" / "stages" / "01-one"), found, rtol=1e-5)
    shown = inspect_stage(recipe, 0, prepared, 0, 3)
    [first, *views] = shown.packs[0].segments[0].pictures
    assert first.pixels.shape == (16, 16, 3)
    assert [view.pixels.shape[0] for view in views] == [16, 16, 8, 8]
    assert views[0].made.endswith(str(plan_views(stage.planned_views, 16, 0, "pictures", shown.packs[0].segments[0].id, 0)[0]))
    assert shown.packs[2].segments[0].pictures[1].made != views[0].made
    assert "view: " in inspection_page(shown, "title", "subtitle")
