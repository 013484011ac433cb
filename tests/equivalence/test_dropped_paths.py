"""Stochastic depth: drawn from seed, sample, epoch and view, so that packs, workers and blocks that run twice change nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from transformers import ViTConfig, ViTModel
from view_stages import DEPTH, PATHS, gradients_of_step, gradients_of_steps, train_views, views_recipe

from terrace.errors import Preempted
from terrace.models.build import build_model, model_config
from terrace.models.dropped_paths import paths_of
from terrace.objectives.chance import kept_paths, patch_noise
from terrace.objectives.mae import PictureBatch, summed_loss
from terrace.recipe.rules import check
from terrace.recipe.schema import Model

MAE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "decoder_hidden_size": 16, "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "norm_pix_loss": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_chances_rise_and_are_those_of_the_picture_alone():
    many = [f"p{number}" for number in range(400)]
    whole = kept_paths(3, ["s"] * 400, many, [0] * 400, 2, 5, 0.4)
    assert whole.shape == (2, 400, 5, 2)
    for layer in range(5):
        factors, chance = whole[:, :, layer], 0.1 * layer
        assert set(np.unique(factors)) == ({0.0, np.float32(1 / (1 - chance))} if layer else {1.0})
        assert (factors == 0).mean() == pytest.approx(chance, abs=0.05)
        assert factors.mean() == pytest.approx(1.0, abs=0.1)
    np.testing.assert_array_equal(kept_paths(3, ["s"] * 2, many[7:9], [0, 0], 2, 5, 0.4), whole[:, 7:9])
    assert (whole[0] != whole[1]).any()
    for other in (kept_paths(4, ["s"] * 400, many, [0] * 400, 2, 5, 0.4), kept_paths(3, ["s"] * 400, many, [1] * 400, 2, 5, 0.4)):
        assert (other != whole).any()
    assert kept_paths(0, ["s"], ["p"], [0], 1, 1, 0.4).tolist() == [[[[1.0, 1.0]]]]


def written_out(model: ViTModel, pictures: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The blocks one after another, with the factors of each picture."""
    hidden = model.embeddings(pictures, interpolate_pos_encoding=pictures.shape[-1] != model.config.image_size)
    for number, layer in enumerate(model.layers):
        branch = layer.attention(layer.layernorm_before(hidden), None)[0]
        hidden = hidden + factors[:, number, 0].view(-1, 1, 1) * branch
        hidden = hidden + factors[:, number, 1].view(-1, 1, 1) * layer.mlp(layer.layernorm_after(hidden))
    return model.layernorm(hidden)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_tower_with_factors_is_its_formula_in_value_and_gradients(recomputed):
    """Also where blocks run again in the backward pass, after pictures of another size went through."""
    config = ViTConfig(**{key: value for key, value in MAE.items() if "decoder" not in key and key != "norm_pix_loss"})
    torch.manual_seed(0)
    model, reference = (ViTModel(config, add_pooling_layer=False).double().train() for _ in range(2))
    reference.load_state_dict(model.state_dict())
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    large, small = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    factors = torch.from_numpy(kept_paths(0, ["s"] * 8, list("abcdefgh"), [0] * 8, 1, 3, 0.7)[0]).double()
    paths = paths_of(model, model.layers)
    assert paths_of(model, model.layers) is paths
    paths.forget()
    with paths.running(factors[:4]):
        first = model(large).last_hidden_state
    with paths.running(factors[4:]):
        second = model(small, interpolate_pos_encoding=True).last_hidden_state
    ours = (first.pow(3).sum(), second.pow(3).sum())
    (ours[0] + ours[1]).backward()
    theirs = written_out(reference, large, factors[:4]).pow(3).sum()
    more = written_out(reference, small, factors[4:]).pow(3).sum()
    (theirs + more).backward()
    assert float(ours[0].detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    assert float(ours[1].detach()) == pytest.approx(float(more.detach()), rel=1e-12)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(large).last_hidden_state, reference.eval()(large).last_hidden_state)
    assert not torch.equal(first, model(large).last_hidden_state)


@pytest.mark.parametrize("case", PATHS)
def test_packs_change_nothing_where_pictures_go_past_branches(case):
    whole, found = gradients_of_step(0, 1, case, [12])
    plain, _ = gradients_of_step(0, 1, case.split("-")[0], [12])
    assert abs(whole - plain) > 1e-4
    for sizes in ([6, 6], [5, 3, 0, 4]):
        value, chunked = gradients_of_step(0, 1, case, sizes)
        assert value == pytest.approx(whole, rel=1e-12)
        largest = max(float(np.abs(gradient).max()) for gradient in found.values())
        assert max(float(np.abs(chunked[key] - found[key]).max()) for key in found) < 1e-11 * largest


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing_where_pictures_go_past_branches(ranks):
    sizes = {2: [6, 6], 4: [3, 3, 3, 3]}[ranks]
    cases = [(case, sizes) for case in PATHS]
    whole = [gradients_of_step(0, 1, case, [12]) for case in PATHS]
    for answers in run_ranks(ranks, gradients_of_steps, cases, timeout=300):
        for (value, found), (wanted, reference) in zip(answers, whole):
            assert value == pytest.approx(wanted, rel=1e-12)
            largest = max(float(np.abs(gradient).max()) for gradient in reference.values())
            assert max(float(np.abs(found[key] - reference[key]).max()) for key in reference) < 1e-11 * largest


def test_a_masked_autoencoder_goes_past_branches_in_any_packs():
    section = Model.model_validate({"architecture": "vit_mae", "config": MAE})
    model = build_model(section, model_config(section)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)  # so that a branch shows
    names = list("abcdef")
    rows = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (6, 3 * 32 * 32), dtype=np.uint8))
    noise = torch.from_numpy(patch_noise(0, ["s"] * 6, names, [0] * 6, 16))
    paths = torch.from_numpy(kept_paths(0, ["s"] * 6, names, [0] * 6, 1, 3, 0.6)[0])

    def loss(part: slice, with_paths: bool = True) -> float:
        batch = PictureBatch(len(rows[part]), rows[part], None, noise[part], torch.float64, paths[part] if with_paths else None)
        return float(summed_loss(model, batch).detach())

    plain = loss(slice(0, 6), with_paths=False)
    whole = loss(slice(0, 6))
    assert sum(map(loss, (slice(0, 4), slice(4, 5), slice(5, 6)))) == pytest.approx(whole, rel=1e-12)
    assert abs(whole - plain) > 1e-4


def weights(folder: Path) -> str:
    [file] = (folder / "final").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_stage_whose_pictures_go_past_branches_resumes_to_the_same_bits(tmp_path):
    """With blocks that run twice, and a weight decay that rises."""
    train = {"vision": {"lr": 1e-2, "drop_path": 0.6, "activation_checkpointing": True}, "heads": {"lr": 1e-2}}
    optimizer = {"weight_decay": 0.04, "final_weight_decay": 0.4}
    recipe = views_recipe("dino-paths", train=train, optimizer=optimizer, checkpoint={"every_steps": 1})
    assert check(recipe) == []
    values = {"whole": recipe.model_dump(mode="json")}
    train_views(0, 1, values, str(tmp_path))
    again = {"again": values["whole"]}
    with pytest.raises(Preempted):
        train_views(0, 1, again, str(tmp_path), stop_after=2)
    train_views(0, 1, again, str(tmp_path))
    assert weights(tmp_path / "again") == weights(tmp_path / "whole")
    kept = train | {"vision": train["vision"] | {"activation_checkpointing": False}}
    values = {"kept": views_recipe("dino-paths", train=kept, optimizer=optimizer).model_dump(mode="json")}
    train_views(0, 1, values, str(tmp_path))
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "kept")]
    found = [[float(line.split('"loss": ')[1].split(",")[0]) for line in one] for one in lines]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_mistakes_are_told_by_name():
    def told(**stage: Any) -> list[str]:
        return [str(problem) for problem in check(views_recipe("dino", **stage))]

    heads = {"heads": {"lr": 1e-2}}
    apart = {"views": [{"side": 16}, {"side": 8}, {"side": 16}], "train": {"vision": {"lr": 1e-2, "drop_path": 0.1}, **heads}}
    assert told(**apart) == []
    apart["train"]["vision"]["activation_checkpointing"] = True
    assert any("views of one size beside one another" in line for line in told(**apart))
    assert any("not offered with parallel.compile" in line for line in told(**DEPTH, parallel={"compile": True}))
    found = told(train={"vision": {"lr": 1e-2}, "language": {"lr": 1e-2, "drop_path": 0.1}, **heads})
    assert any("is offered for vision under the objectives" in line for line in found)
