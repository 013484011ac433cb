"""Build a model: its transformers configuration, its empty shape, and the shape filled with weights on a device.

The order is always the same: a skeleton on the meta device (no memory), then memory and weights tensor by tensor. A
strategy that shards does the second half by itself (`train/strategies`).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.families.registry import built_in, family_class, written_architecture
from terrace.models.families.interface import configurations
from terrace.models.families.registry import family_model, family_model_named, family_of_model
from terrace.models.parts import part_parameters
from terrace.models.patch_products import as_products
from terrace.models.tensor_files import local_config
from terrace.models.weights import TensorSource, initial_weights
from terrace.recipe.schema import Model, PartName, Recipe
from terrace.recipe.schema_changes import ModelChanges


def model_config(model: Model, tokenizer: Any | None = None) -> Any:
    """The transformers configuration. `tokenizer` (data.tokenizer.TextTokenizer) fills in token ids and the vocabulary size.

    Raises InputError if the tokenizer has more tokens than the configuration's vocabulary.
    """
    family = family_class(model.architecture)
    if model.pretrained is not None:
        config = directory_config(local_config(model.pretrained))
        if config.model_type != family.name:
            raise InputError(f"model.pretrained is a {config.model_type}, model.architecture says {model.architecture}")
    elif family.gives == "pictures":
        config = AutoConfig.for_model(family.name, **(model.config or {}))
    else:
        known = tokenizer.token_id if tokenizer is not None else lambda token: None
        values = family.completed(model.config or {}, known, tokenizer.vocabulary_size if tokenizer is not None else 0)
        text = values if family.flat else dict(values.get("text_config") or {})
        if tokenizer is not None:
            text.setdefault("vocab_size", tokenizer.vocabulary_size)
            marks = tokenizer.marks(tokenizer.fit(family.of(values)))
            text.setdefault("bos_token_id", marks[family.begin_of_text])
            text.setdefault("eos_token_id", marks[family.end_of_turn])
            values.update({field: marks[role] for field, role in family.token_fields.items()})
            for field, role in family.text_fields.items():
                text.setdefault(field, marks[role])
        if not family.flat:
            values["text_config"] = text
        family_model_named(model.architecture)  # a class that transformers lacks is registered with its family
        config = AutoConfig.for_model(family.name, **values)
    if family.gives == "pictures":
        return config
    if tokenizer is not None and tokenizer.vocabulary_size > language_config(config).vocab_size + family.spare_rows + model.coming_tokens:
        raise InputError(
            f"the tokenizer has {tokenizer.vocabulary_size} tokens, model.config.text_config.vocab_size is "
            f"{language_config(config).vocab_size}: raise it to at least the tokenizer's"
        )
    if getattr(language_config(config), "attention_dropout", 0.0):
        raise InputError("model.config.text_config.attention_dropout must be 0: packed attention has no dropout")
    return config


def directory_config(directory: str | Path) -> Any:
    """The transformers configuration of a directory of this machine. No code that lies in it is run: a class that transformers lacks
    is this package's own, registered with its family."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise InputError(f"{directory}: no config.json; a Hugging Face model directory is expected")
    values = json.loads(file.read_text())
    kind = written_architecture(values)
    if kind in built_in():
        family_model_named(kind)
    if kind != values.get("model_type"):
        return AutoConfig.for_model(kind, **{name: value for name, value in values.items() if name != "model_type"})
    return AutoConfig.from_pretrained(directory)


def meta_model(config: Any) -> Any:
    """The model's shape on the meta device: parameters have names and sizes and take no memory. `config` is copied."""
    config = copy.deepcopy(config)
    for sub in configurations(config):
        sub._attn_implementation = "sdpa"
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = family_model(config).skeleton(config)
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.tie_weights()
    as_products(model)
    for name, buffer in list(model.named_buffers()):
        module, _, leaf = name.rpartition(".")
        if leaf in family_of_model(model).held_buffers:  # else nothing would load, check, hand over or export it
            owner = model.get_submodule(module)
            del owner._buffers[leaf]
            owner.register_parameter(leaf, torch.nn.Parameter(buffer, requires_grad=False))
    return model


def restore_buffers(model: Any) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, numbers of positions): those with a fraction in
    float32 whatever the weights are, whole numbers as they are. Weights stay: some classes draw those of a module in the same
    function, which leaves alone what is marked as there."""
    owner = model
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            owner = module
        buffers = dict(module.named_buffers(recurse=False))
        if not buffers:
            continue
        for name, buffer in buffers.items():
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())
        inside = list(module.parameters())  # of modules inside it, too, which keep what they have
        for weight in inside:
            weight._is_hf_initialized = True
        owner._init_weights(_with_empty_parameters(module))
        for weight in inside:
            del weight._is_hf_initialized


def _with_empty_parameters(module: Any) -> Any:
    """The module with its buffers, and in place of its parameters (which a strategy may have split) ones that hold nothing."""
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = {
        name: parameter if parameter is None
        else torch.nn.Parameter(torch.empty(tuple(getattr(parameter, "ds_shape", parameter.shape)), device="meta"), requires_grad=False)
        for name, parameter in module._parameters.items()
    }  # fmt: skip
    return shell


def materialise(
    skeleton: Any, source: TensorSource, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Any:
    """Give a skeleton memory on the device and fill it from the source. Returns the same object."""
    trainable = {name: parameter.requires_grad for name, parameter in skeleton.named_parameters()}
    model = skeleton.to(dtype).to_empty(device=device)
    model.tie_weights()
    restore_buffers(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source(name))
            parameter.requires_grad_(trainable[name])
    return model


def build_model(
    model: Model, config: Any, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    start: Path | None = None, changes: ModelChanges | None = None,
) -> Any:
    """A whole model on one device: from `start`, or from the recipe's directory, parts, or seeded random numbers. `changes`: of the
    stage that starts so."""
    skeleton = meta_model(config)
    source, _ = initial_weights(model, skeleton, start, changes)
    return materialise(skeleton, source, device, dtype)


def parameter_counts(recipe: Recipe, config: Any | None = None) -> dict[PartName, int]:
    """Parameters per part, counted on the meta device (a tied tensor counts once, in the language part).

    A tokenizer that is still to be trained counts with the vocabulary that the recipe asks for.
    """
    shape = meta_model(config if config is not None else planned_config(recipe))
    return {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(shape).items()}


def planned_config(recipe: Recipe) -> Any:
    """The configuration before there is a tokenizer: one that is still to be trained has the vocabulary that the recipe asks for."""
    config = model_config(recipe.model)
    trained, text = recipe.tokenizer.train_vocabulary_size, language_config(recipe.model.config or {})
    counted = language_config(config)
    if trained is not None and recipe.model.pretrained is None and "vocab_size" not in text and hasattr(counted, "vocab_size"):
        counted.vocab_size = trained
    return config
