"""`final/` as other tools read it: template, generation settings, processors, pipelines; what a published checkpoint brought stays."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from families import case_of, model_of, picture
from PIL import Image

from terrace.models.export import chat_template, export_hf
from terrace.recipe.loading import load_recipe
from terrace.train.finish import final_precision, kept_files

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many circles?"}]}]


def exported(name: str, folder: Path, **more) -> Path:
    case = case_of(name, folder / "tokenizer")
    state = {key: value.detach() for key, value in model_of(case, 0.05).named_parameters()}
    return export_hf(state, case.config, case.tokenizer.directory, folder / "final", case.pixels, **more)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "internvl"])
def test_the_template_is_the_family_s_and_the_processor_reads_it(name, tmp_path):
    from transformers import AutoProcessor, AutoTokenizer, pipeline

    final = exported(name, tmp_path)
    case = case_of(name, tmp_path / "tokenizer")
    assert (final / "chat_template.jinja").read_text() == case.family.chat_template
    tokenizer = AutoTokenizer.from_pretrained(final)
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert text.count(case.family.marks["image"]) == 1
    assert "How many circles?" in text
    if name != "llava" and importlib.util.find_spec("torchvision") is None:
        return  # transformers makes these families' video processor with torchvision alone
    processor = AutoProcessor.from_pretrained(final)
    assert processor.apply_chat_template(QUESTION, add_generation_prompt=True) == text
    image = Image.open(io.BytesIO(picture(80, 60)))
    asked = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "How many circles?"}]}]
    said = pipeline("image-text-to-text", model=str(final), processor=processor)(text=asked, max_new_tokens=3)
    assert said[0]["generated_text"][-1]["role"] == "assistant"


def test_what_a_checkpoint_brought_stays(tmp_path):
    """Whichever form it published its template in; the next stage's export finds it in the same place."""
    start = tmp_path / "start"
    start.mkdir()
    settings = {"eos_token_id": [1, 2], "temperature": 0.1, "repetition_penalty": 1.05}
    (start / "generation_config.json").write_text(json.dumps(settings))
    (start / "chat_template.json").write_text(json.dumps({"chat_template": "published {{ messages }}"}))
    kept = kept_files(str(start))
    final = exported("qwen2_vl", tmp_path, kept=kept, stored=torch.bfloat16, dtype="bfloat16")
    assert json.loads((final / "generation_config.json").read_text()) == settings
    assert (final / "chat_template.jinja").read_text() == "published {{ messages }}"
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    assert kept_files(None) == {}
    for files, found in [
        ({"chat_template.jinja": b"a", "chat_template.json": b'{"chat_template": "b"}'}, "a"),
        ({"tokenizer_config.json": b'{"chat_template": "c"}'}, "c"),
        ({"tokenizer_config.json": b'{"chat_template": [{"name": "x", "template": "d"}, {"name": "default", "template": "e"}]}'}, "e"),
        ({"chat_template.json": b"{}", "tokenizer_config.json": b'{"chat_template": "f"}'}, "f"),
        ({"tokenizer_config.json": b"{}"}, ""),
        ({}, ""),
    ]:
        assert chat_template(files) == found


def test_weights_are_rounded_only_where_no_stage_follows():
    recipe = load_recipe(TINY, ["stages.0.precision=bf16", "stages.3.precision=bf16", "stages.3.start_from=alignment"])
    assert [final_precision(recipe, index) for index in range(4)] == ["fp32", "fp32", "fp32", "bf16"]
    chosen = load_recipe(TINY, ["stages.0.final_precision=bf16", "stages.3.final_precision=fp32", "stages.3.precision=bf16"])
    assert [final_precision(chosen, index) for index in (0, 3)] == ["bf16", "fp32"]
