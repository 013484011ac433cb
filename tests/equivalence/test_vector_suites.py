"""Suites of models that give vectors: classes, retrieval, neighbours and the probe of an exported CLIP, against its own forward."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from towers import TOWERS
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from terrace.data.tokenizer import train_tokenizer
from terrace.errors import InputError
from terrace.evaluate.replies import Settings
from terrace.evaluate.run import evaluate_model
from terrace.families.registry import family_class
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.recipe.schema import Model

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "white": (240, 240, 240), "black": (10, 10, 10)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, final): an exported CLIP of random weights, and 40 pictures of five colours with some noise."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(3)
    rows = []
    for number in range(40):
        name, colour = list(COLOURS.items())[number % 5]
        noisy = np.clip(np.asarray(colour) + rng.integers(-30, 30, (36, 44, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": name})
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(["a photo of a red green blue white black."] * 40, 330, folder / "tokenizer", family_class("clip"))
    section = Model.model_validate({"architecture": "clip", "config": TOWERS["clip"]})
    config = model_config(section, tokenizer)
    model = build_model(section, config)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return folder, export_hf(state, config, tokenizer.directory, folder / "final", pixels=(1, 3_136))


def test_the_figures_are_those_of_the_class_s_own_forward(made, tmp_path):
    folder, final = made
    rows = [json.loads(line) for line in (folder / "colours.jsonl").read_text().splitlines()]
    names = [f"{kind}:{folder / 'colours.jsonl'}" for kind in ("zero_shot", "retrieval", "knn", "probe")]
    scores = evaluate_model(final, names, tmp_path / "out", Settings(device="cpu", batch_size=7))["suites"]
    told = {name: {figure: entry["value"] for figure, entry in suite["scores"].items()} for name, suite in scores.items()}
    model, tokenizer = CLIPModel.from_pretrained(final).eval(), AutoTokenizer.from_pretrained(final)
    pictures = [Image.open(folder / row["image"]) for row in rows]
    prompts = [f"<|startoftext|>a photo of a {name}.<|endoftext|>" for name in COLOURS]
    texts = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    pixels = AutoImageProcessor.from_pretrained(final)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=texts["input_ids"], pixel_values=pixels).logits_per_image
    wanted = torch.arange(40) % 5
    assert told["zero_shot:colours"]["accuracy"] == pytest.approx(float((logits.argmax(1) == wanted).double().mean()), abs=0.05)
    assert told["zero_shot:colours"]["accuracy_of_5"] == 1.0
    assert told["retrieval:colours"]["image_to_text_r5"] == 1.0
    assert told["retrieval:colours"]["image_to_text_r1"] <= told["retrieval:colours"]["image_to_text_r5"]
    assert told["knn:colours"]["accuracy"] > 0.9, "single colours lie apart in any features"
    assert told["probe:colours"]["accuracy"] > 0.9
    assert scores["knn:colours"]["cases"] == 40


def test_a_suite_that_the_model_cannot_be_asked_is_refused_before_it_is_loaded(made, tmp_path):
    folder, final = made
    with pytest.raises(InputError, match=r"asks a model that gives text; clip gives vectors"):
        evaluate_model(final, [f"caption:{folder / 'colours.jsonl'}"], tmp_path / "out", Settings(device="cpu"))
