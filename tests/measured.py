"""FLOPs and activations of a case's model as torch counts them, beside what the planner says of the same pack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from families import Case, conversation, pack_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from terrace.families.configurations import language_config
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model
from terrace.models.families.registry import family_of_model
from terrace.models.parts import part_parameters
from terrace.objectives.lm import summed_loss
from terrace.planner.flops import PackLoad, exact_load, forward_flops, training_flops
from terrace.planner.memory import PackSize, stage_memory
from terrace.planner.shapes import shape_of_config
from terrace.recipe.schema import PartName, Recipe
from terrace.train.setup import checkpoint_activations, freeze_parts


def trainable(case: Case, trained: Sequence[PartName]) -> tuple[PartName, ...]:
    """Those of the parts that the family may train; the language model where there is none."""
    return tuple(part for part in trained if part in case.family.trainable()) or ("language",)


def flops(case: Case, trained: Sequence[PartName], monkeypatch) -> tuple[PackLoad, int, list[tuple[float, float]]]:
    """(the planner's load, the pack's visual tokens, (counted, planned) of a training step and of a forward pass alone)."""
    model = build_model(case.section, case.config)
    if case.family.experts:  # the counter does not know the grouped product
        model.set_experts_implementation("eager")
    use_attention(model, "sdpa_segments")
    unused = set(family_of_model(model).unused(case.config, [name for name, _ in model.named_parameters()]))
    for part, pairs in part_parameters(model).items():
        for name, parameter in pairs:
            parameter.requires_grad_(part in trained and name not in unused)
    example = pack_of(case, [conversation(1, [(150, 100)]), conversation(2, []), conversation(3, [(60, 160)])])
    if case.family.reads_questions:  # the plan counts questions of one length: here as long as those of the pack
        monkeypatch.setattr(type(case.family), "counted_question", int(example.image_facts[:, 1].max()))
    shape = shape_of_config(case.config.to_dict(), case.name)
    pictures = [one for facts in example.image_facts.tolist() for one in case.family.tower_pictures(facts)]
    lengths = np.diff(example.segment_ends, prepend=0).tolist()
    load = exact_load(shape, lengths, pictures, example.supervised_tokens)
    batch = to_device(example, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        summed_loss(model, batch, 64).backward()
    step = (counter.get_total_flops(), training_flops(shape, load, trained).model)
    model.requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        summed_loss(model, batch, 64)
    return load, example.visual_tokens, [step, (counter.get_total_flops(), sum(forward_flops(shape, load).values()))]


def activations(case: Case, trained: Sequence[PartName], checkpointing: bool, monkeypatch) -> tuple[int, float]:
    """(bytes that autograd saves for backward under ddp on a CPU, without the weights themselves; the planner's)."""
    training = {part: {"lr": 1e-3, "activation_checkpointing": checkpointing} for part in trained}
    [stage] = Recipe.model_validate({
        "name": "r", "model": case.section.model_dump(), "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"a": {"uri": "x"}}},
        "stages": [{"name": "s", "train": training, "mixture": {"weights": {"a": 1.0}}, "budget": {"steps": 1}, "precision": "fp32",
                    "sequence_length": 1024, "loss_chunk_tokens": 64}],
    }).stages  # fmt: skip
    model = build_model(case.section, case.config)
    use_attention(model, "sdpa_segments")
    model.train()
    freeze_parts(model, stage)
    checkpoint_activations(model, stage)
    example = pack_of(case, [conversation(number, [(200, 150)]) for number in range(5)])
    if case.family.reads_questions:
        monkeypatch.setattr(type(case.family), "counted_question", int(example.image_facts[:, 1].max()))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}  # held, so that no storage is freed and its address used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_loss(model, to_device(example, "cpu", torch.float32), 64)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    size = PackSize(example.tokens, example.visual_tokens, example.supervised_tokens)
    memory = stage_memory(shape_of_config(case.config.to_dict(), case.name), stage, 1, size, on_gpu=False)
    width, vocabulary = language_config(case.config).hidden_size, language_config(case.config).vocab_size
    head = 4 * example.supervised_tokens * width + (4 * vocabulary * width if "language" in trained else 0)  # gradients, made forward
    return measured, memory.vision_activations + memory.language_activations + head
