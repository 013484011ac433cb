"""A stage's final weights as a plain Hugging Face directory: config, safetensors in shards, tokenizer, image preprocessing,
chat template and generation settings: what `AutoProcessor`, `pipeline` and servers ask for.

Weights between stages are the float32 masters whatever the stage's precision, so that the next stage starts from exactly
where this one ended; those of the last stage are what users load, in the stage's own precision. `dtype` in config.json says
what they were computed in, and that is what `from_pretrained` and servers load them as. What a published checkpoint
brought beside its weights (its template, its generation settings) stays as it was.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig

from terrace.data.tokenizer import QUESTION_TOKENIZER, file_for
from terrace.families.configurations import language_config
from terrace.models.build import meta_model
from terrace.models.families.interface import configurations
from terrace.models.families.registry import family_of_model

SHARD_SIZE = "4GB"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # where a directory may hold it, in this order
KEPT_FILES = ("generation_config.json", "video_preprocessor_config.json", *TEMPLATE_FILES)  # of the checkpoint that a run starts from


def export_hf(
    state: Mapping[str, torch.Tensor], config: Any, tokenizer_dir: Path | None, out_dir: Path,
    pixels: tuple[int, int] = (3136, 1_003_520), dtype: str = "float32", stored: torch.dtype = torch.float32,
    kept: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a Hugging Face directory (`out_dir` must not exist) from full tensors by parameter name. Returns `out_dir`.

    `dtype` goes into config.json, `stored` is what the files hold; `kept` are `KEPT_FILES` of the checkpoint that the run
    started from. The directory appears under its name only when it is complete.
    """
    kept = kept or {}
    work = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config = copy.deepcopy(config)
    for sub in configurations(config):
        sub.dtype = dtype
    model = meta_model(config)
    config.architectures = [type(model).__name__]
    family = family_of_model(model)
    if family.code:
        config.auto_map = dict(family.code)
    family.exported_config(config).save_pretrained(work)
    for file in family.code_files():
        shutil.copyfile(file, work / file.name)
    if family.family.gives == "text":
        GenerationConfig(eos_token_id=language_config(config).eos_token_id, do_sample=False).save_pretrained(work)
    save_torch_state_dict(_published(model, state, stored), work, max_shard_size=SHARD_SIZE)
    _write_json(work / "preprocessor_config.json", family.family.preprocessor(pixels))
    if processor := family.family.processor():
        _write_json(work / "processor_config.json", processor)
    if tokenizer_dir is not None:
        there = {name: file_for(tokenizer_dir, name, family.family.name) for name in {*TOKENIZER_FILES, *TEMPLATE_FILES}}
        for name in TOKENIZER_FILES:
            if there[name].is_file():
                shutil.copyfile(there[name], work / name)
        if family.family.reads_questions:  # the class's processor wants a tokenizer of its own for them
            questions = tokenizer_dir / QUESTION_TOKENIZER
            copied = shutil.ignore_patterns(QUESTION_TOKENIZER)
            shutil.copytree(questions if questions.is_dir() else tokenizer_dir, work / QUESTION_TOKENIZER, ignore=copied)
        own = {name: there[name].read_bytes() for name in TEMPLATE_FILES if there[name].is_file()}
        if template := chat_template(kept) or chat_template(own) or family.family.chat_template:
            (work / "chat_template.jinja").write_text(template)
    for name in ("generation_config.json", "video_preprocessor_config.json"):
        if name in kept:
            (work / name).write_bytes(kept[name])
    for file in work.iterdir():  # safetensors are written readable by their owner alone
        file.chmod(0o644)
    shutil.rmtree(out_dir, ignore_errors=True)
    work.rename(out_dir)
    return out_dir


def chat_template(files: Mapping[str, bytes]) -> str:
    """The Jinja template that a directory's `TEMPLATE_FILES` hold, in whichever of the forms that were published; empty: none."""
    for name in TEMPLATE_FILES:
        if name not in files:
            continue
        if name.endswith(".jinja"):
            return files[name].decode("utf-8")
        found = json.loads(files[name]).get("chat_template")
        if isinstance(found, list):  # several by name, as tokenizer_config.json may hold them
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if found:
            return str(found)
    return ""


def _published(model: Any, state: Mapping[str, torch.Tensor], stored: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors under the names in which the family is published. Raises ValueError if they are not exactly the model's."""
    family, expected = family_of_model(model), {name for name, _ in model.named_parameters()}
    if expected != set(state):
        raise ValueError(f"export: tensors differ from the model's: {sorted(expected ^ set(state))[:8]}")
    return {
        published: piece.to(stored).contiguous()
        for name, tensor in state.items()
        for published, piece in family.stored(name, tensor).items()
    }


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
