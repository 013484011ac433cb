"""A stage's final weights as a plain Hugging Face directory: config, safetensors in shards, tokenizer, image preprocessing.

Weights are the float32 masters whatever the stage's precision, so that the next stage starts from exactly where this
one ended; `dtype` in config.json says what they were computed in, and that is what `from_pretrained` and servers load
them as.
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

from terrace.models.build import meta_model
from terrace.models.families.interface import configurations
from terrace.models.families.registry import family_of_model

SHARD_SIZE = "4GB"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
    "merges.txt", "added_tokens.json",
)


def export_hf(
    state: Mapping[str, torch.Tensor], config: Any, tokenizer_dir: Path | None, out_dir: Path,
    pixels: tuple[int, int] = (3136, 1_003_520), dtype: str = "float32",
) -> Path:
    """Write a Hugging Face directory (`out_dir` must not exist) from full tensors by parameter name. Returns `out_dir`.

    The directory appears under its name only when it is complete.
    """
    work = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config = copy.deepcopy(config)
    for sub in configurations(config):
        sub.dtype = dtype
    model = meta_model(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(work)
    save_torch_state_dict(_published(model, state), work, max_shard_size=SHARD_SIZE)
    family = family_of_model(model)
    if family.family.gives == "text":
        GenerationConfig(eos_token_id=config.text_config.eos_token_id, do_sample=False).save_pretrained(work)
    _write_json(work / "preprocessor_config.json", family.family.preprocessor(pixels))
    if processor := family.family.processor():
        _write_json(work / "processor_config.json", processor)
    if tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, work / name)
    for file in work.iterdir():  # safetensors are written readable by their owner alone
        file.chmod(0o644)
    shutil.rmtree(out_dir, ignore_errors=True)
    work.rename(out_dir)
    return out_dir


def _published(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names in which the family is published. Raises ValueError if they are not exactly the model's."""
    family, expected = family_of_model(model), {name for name, _ in model.named_parameters()}
    if expected != set(state):
        raise ValueError(f"export: tensors differ from the model's: {sorted(expected ^ set(state))[:8]}")
    return {family.published_name(name): tensor.contiguous() for name, tensor in state.items()}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")
