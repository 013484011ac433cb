"""They learn: a tiny CLIP, SigLIP and Q-Former find the caption of a drawn scene, a masked autoencoder draws what it did not see, and
a BERT tells masked words of captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.demo.corpus import write_corpus
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
    "bert": TEXT,
    "vit_mae": {
        **VISION, "patch_size": 8, "decoder_hidden_size": 64, "decoder_intermediate_size": 128, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4, "norm_pix_loss": True,
    },
    "blip_2_matching": {
        "vision_config": VISION, "text_config": {"model_type": "opt"}, "num_query_tokens": 8, "image_text_hidden_size": 64,
        "qformer_config": {
            **WIDTH, "num_hidden_layers": 2, "max_position_embeddings": 64, "encoder_hidden_size": 64, "use_qformer_text_input": True,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), samples={"captions": 2_600}, workers=2)


def train(corpus: Path, run_dir: Path, name: str, objective: str, steps: int) -> dict[str, dict[str, float]]:
    parts = {"clip": ("vision", "projector", "language"), "siglip": ("vision", "projector", "language"), "mlm": ("language",)}
    training = {part: {"lr": 1.5e-3} for part in parts.get(objective, ("vision", "projector"))}
    batch = {"packs": 24} if objective == "mlm" else {"packs": 1, "samples_per_pack": 64}
    recipe = Recipe.model_validate({
        "name": "learn", "model": {"architecture": name, "config": MODELS[name]}, "tokenizer": {"train_vocabulary_size": 600},
        "data": {"sources": {"captions": {"uri": str(corpus / "captions.jsonl"), "holdout_samples": HELD_OUT}}},
        "stages": [{
            "name": "one", "objective": objective, "train": training, "precision": "fp32",
            "mixture": {"weights": {"captions": 1.0}}, "sequence_length": 64, "budget": {"steps": steps},
            "batch": batch, "schedule": {"kind": "cosine", "warmup": 0.1},
            "optimizer": {"betas": [0.9, 0.98], "weight_decay": 0.05}, "data_loading": {"engine": "inline"},
            "evaluate": {"max_samples_per_kind": HELD_OUT},
        }],
    })  # fmt: skip
    prepare_data(recipe, run_dir, use_ray=False)
    return run_stage(recipe, 0, run_dir, 1, WorkerContext()).evaluation


@pytest.mark.parametrize(("name", "objective", "r5"), [
    ("clip", "clip", 0.5), ("siglip", "siglip", 0.12), ("blip_2_matching", "matching", 0.08),
])  # fmt: skip
def test_the_caption_of_a_scene_is_found(name, objective, r5, corpus, tmp_path):
    """Of 200 held-out pairs, chance finds one in 40 among the first five."""
    torch.set_num_threads(1)
    after = train(corpus, tmp_path / "run", name, objective, 120)["after"]
    print(name, json.dumps(after))
    assert after["caption/image_to_text_r5"] > r5
    assert after["caption/text_to_image_r5"] > r5


def test_a_masked_autoencoder_draws_what_it_did_not_see(corpus, tmp_path):
    """Held-out scenes: an untrained decoder is off by about 1, the deviation of a patch."""
    torch.set_num_threads(1)
    evaluation = train(corpus, tmp_path / "run", "vit_mae", "mae", 200)
    print("mae", json.dumps(evaluation))
    assert evaluation["before"]["caption/loss"] > 0.9
    assert evaluation["after"]["caption/loss"] < 0.6


def test_masked_words_of_captions_are_told(corpus, tmp_path):
    """Held-out captions under fixed masks."""
    torch.set_num_threads(1)
    evaluation = train(corpus, tmp_path / "run", "bert", "mlm", 200)
    print("mlm", json.dumps(evaluation))
    assert evaluation["before"]["caption/accuracy"] < 0.05
    assert evaluation["after"]["caption/accuracy"] > 0.4
    assert evaluation["after"]["caption/loss"] < 0.5 * evaluation["before"]["caption/loss"]
