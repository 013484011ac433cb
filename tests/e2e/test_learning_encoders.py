"""They learn: a tiny CLIP and SigLIP find the caption of a drawn scene, a masked autoencoder's features beat random ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.demo.corpus import write_corpus
from terrace.demo.scenes import draw_shapes
from terrace.evaluate.replies import Settings
from terrace.evaluate.run import evaluate_model
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.recipe.schema import Recipe
from terrace.worker.context import WorkerContext

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
VISION = {**WIDTH, "num_hidden_layers": 2, "image_size": 64, "patch_size": 16}
TEXT = {**WIDTH, "num_hidden_layers": 2, "max_position_embeddings": 64}
HELD_OUT = 200
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"text_config": TEXT, "vision_config": VISION, "projection_dim": 64},
    "siglip": {"text_config": TEXT, "vision_config": VISION},
    "vit_mae": {
        **VISION, "patch_size": 8, "decoder_hidden_size": 64, "decoder_intermediate_size": 128, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4, "norm_pix_loss": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), samples={"captions": 2_600}, workers=2)


def train(corpus: Path, run_dir: Path, name: str, objective: str, steps: int) -> tuple[Recipe, dict[str, float]]:
    parts = ("vision", "projector") if objective == "mae" else ("vision", "projector", "language")
    recipe = Recipe.model_validate({
        "name": "learn", "model": {"architecture": name, "config": MODELS[name]}, "tokenizer": {"train_vocabulary_size": 600},
        "data": {"sources": {"captions": {"uri": str(corpus / "captions.jsonl"), "holdout_samples": HELD_OUT}}},
        "stages": [{
            "name": "one", "objective": objective, "train": {part: {"lr": 1.5e-3} for part in parts}, "precision": "fp32",
            "mixture": {"weights": {"captions": 1.0}}, "sequence_length": 64, "budget": {"steps": steps},
            "batch": {"packs": 1, "samples_per_pack": 64}, "schedule": {"kind": "cosine", "warmup": 0.1},
            "optimizer": {"betas": [0.9, 0.98], "weight_decay": 0.05}, "data_loading": {"engine": "inline"},
            "evaluate": {"max_samples_per_kind": HELD_OUT},
        }],
    })  # fmt: skip
    prepare_data(recipe, run_dir, use_ray=False)
    return recipe, run_stage(recipe, 0, run_dir, 1, WorkerContext()).evaluation["after"]


@pytest.mark.parametrize(("name", "r5"), [("clip", 0.5), ("siglip", 0.12)])
def test_two_towers_find_the_caption_of_a_scene(name, r5, corpus, tmp_path):
    """Of 200 held-out pairs, chance finds one in 40 among the first five."""
    torch.set_num_threads(1)
    _, after = train(corpus, tmp_path / "run", name, name, 120)
    print(name, json.dumps(after))
    assert after["caption/image_to_text_r5"] > r5
    assert after["caption/text_to_image_r5"] > r5


def test_features_of_a_masked_autoencoder_beat_random_ones(corpus, tmp_path):
    """One drawn shape anywhere, of eight colours: which of the four shapes it is, by the 20 nearest others."""
    torch.set_num_threads(1)
    recipe, after = train(corpus, tmp_path / "run", "vit_mae", "mae", 200)
    rng, rows = random.Random(5), []
    while len(rows) < 400:
        scene = draw_shapes(rng.getrandbits(40), most=1)
        scene.picture.save(tmp_path / f"{len(rows)}.png")
        rows.append({"image": f"{len(rows)}.png", "caption": scene.things[0].name})
    (tmp_path / "shapes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = model_config(recipe.model)
    state = {key: parameter.detach() for key, parameter in build_model(recipe.model, config).named_parameters()}
    untrained = export_hf(state, config, None, tmp_path / "random", pixels=(1, 4_096))
    scores = {}
    for told, final in (("mae", tmp_path / "run" / "stages" / "01-one" / "final"), ("random", untrained)):
        suites = evaluate_model(
            final, [f"{kind}:{tmp_path / 'shapes.jsonl'}" for kind in ("knn", "probe")], tmp_path / f"scores-{told}",
            Settings(device="cpu", batch_size=100),
        )["suites"]  # fmt: skip
        scores[told] = {label: suite["scores"]["accuracy"]["value"] for label, suite in suites.items()}
    print("mae", json.dumps(after), json.dumps(scores))
    assert scores["mae"]["knn:shapes"] > scores["random"]["knn:shapes"] + 0.05
