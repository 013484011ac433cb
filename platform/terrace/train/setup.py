"""From a recipe's stage to a strategy that is ready to train: skeleton, freezing, attention, groups, initial weights.

In a stated order, because each step relies on the one before: skeleton on the meta device, adapters, freeze, activation
checkpointing, attention, then the strategy gives it memory and weights. Shared by next-token training and the
on-policy loop.
"""

from __future__ import annotations

import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from terrace.errors import InputError
from terrace.models.attention import activate_flash_attention_3, choose_backend, use_attention
from terrace.models.build import meta_model
from terrace.models.compiled import check_compiler, compile_blocks
from terrace.models.expert_parallel import divide_experts, open_expert_group
from terrace.models.families.registry import family_of_model
from terrace.models.heads import attach_heads, is_head, source_with_heads
from terrace.models.kernels import choose_kernels, use_liger
from terrace.models.lora import adapted_source, add_lora, plain_name, uses_lora
from terrace.models.parts import part_parameters, transformer_blocks
from terrace.models.sequence_parallel import use_sequence_parallel
from terrace.models.view_heads import attach_view_heads, tower_width
from terrace.models.weights import initial_weights
from terrace.recipe.schema import PARTS, Model, Stage
from terrace.train.optimizer import parameter_groups, takes_part
from terrace.train.strategies.interface import Loss, Setup, Strategy
from terrace.train.strategies.open import open_strategy
from terrace.worker.context import WorkerContext

log = logging.getLogger(__name__)


def freeze_parts(model: Any, stage: Stage) -> None:
    """Only the parts that the stage names take gradients, without the tensors that the family never trains: they would
    never get one, and DDP waits for every gradient."""
    unused = set(family_of_model(model).unused(model.config, [name for name, _ in model.named_parameters()]))
    for part, pairs in part_parameters(model).items():
        for name, parameter in pairs:
            training = getattr(stage.train, part)
            trains = training is not None and takes_part(name, training)
            parameter.requires_grad_(trains and plain_name(name) not in unused)
        if getattr(stage.train, part) is not None and pairs and not any(parameter.requires_grad for _, parameter in pairs):
            words = ", ".join(getattr(stage.train, part).only)
            raise InputError(f"stage {stage.name}: train.{part}.only: no tensor of {part} has {words} in its name, such as {pairs[-1][0]}")
    for name, parameter in model.named_parameters():
        if is_head(name):
            parameter.requires_grad_(True)
    if unused:
        log.info("never trained by this family: %d tensors, %s ...", len(unused), min(unused))


class _Recomputed(GradientCheckpointingLayer):
    """Before the class of a block: what it is called with by name is put in its place, where checkpointing keeps it like activations."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        given = inspect.signature(type(self).forward).bind(self, *args, **named)
        return super().__call__(*given.args[1:], **given.kwargs)


def checkpoint_activations(model: Any, stage: Stage) -> None:
    """Recompute the blocks of the parts that ask for it in backward, instead of keeping their activations.

    A frozen part asks through `frozen_activation_checkpointing`: gradients pass through a frozen language model on
    their way to the projector, so its blocks keep activations like trained ones.
    """
    wrapped = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    family = family_of_model(model)
    for part in ("vision", "language"):
        training = getattr(stage.train, part)
        recompute = training.activation_checkpointing if training else stage.frozen_activation_checkpointing
        for block in family.blocks_of(model, part):
            if recompute and not isinstance(block, GradientCheckpointingLayer):  # a class that does not heed what is set below
                block.__class__ = type(f"Recomputed{type(block).__name__}", (_Recomputed, type(block)), {"forward": type(block).forward})
            block.gradient_checkpointing = recompute
            block._gradient_checkpointing_func = wrapped


def prepare_strategy(
    model: Model, stage: Stage, config: Any, context: WorkerContext, loss: Loss, start_weights: Path | None = None
) -> Strategy:
    """A strategy with the stage's initial weights (of `start_weights`, or the recipe's own), frozen parts and optimizer."""
    torch.set_float32_matmul_precision("highest" if stage.precision == "fp32" else "high")
    skeleton = meta_model(config)
    source, _ = initial_weights(model, skeleton, start_weights, stage.model_changes)
    if uses_lora(stage):
        add_lora(skeleton, stage)
        source = adapted_source(skeleton, source, stage.seed)
    if (heads := stage.head_kind) is not None:
        attach_heads(skeleton, *heads)
        source = source_with_heads(skeleton, source, start_weights, stage.seed)
    elif (options := stage.view_options) is not None:
        attach_view_heads(skeleton, stage.objective, options, tower_width(config))
        source = source_with_heads(skeleton, source, start_weights, stage.seed)
    freeze_parts(skeleton, stage)
    checkpoint_activations(skeleton, stage)
    skeleton.train()
    backend, reason = choose_backend(model.attention, torch.device(context.device).type, stage.precision)
    use_attention(skeleton, backend)
    if backend == "varlen":
        reason = f"{reason}; {activate_flash_attention_3()[1]}"
    if stage.parallel.sequence_parallel > 1:
        use_sequence_parallel(skeleton, backend, stage.parallel.sequence_parallel, stage.parallel.sequence_exchange)
    kernels, kernels_reason = choose_kernels(model.kernels, torch.device(context.device).type)
    if context.rank == 0:
        log.info("attention: %s (%s)", backend, reason)
        log.info("norms and gates: %s (%s)", kernels, kernels_reason)
    if kernels == "liger":
        use_liger(skeleton)
    experts = None
    if stage.parallel.experts > 1:
        experts = divide_experts(skeleton, open_expert_group(stage.parallel.experts, context.rank, context.world_size))
        if context.rank == 0:
            log.info("experts: %d ranks share those of each layer (parallel.experts)", stage.parallel.experts)
    if stage.parallel.compile:
        check_compiler(torch.device(context.device).type)
        blocks = compile_blocks(skeleton)
        if context.rank == 0:
            log.info("torch.compile: %d of %d transformer blocks (parallel.compile)", blocks, len(transformer_blocks(skeleton)))
    groups = parameter_groups(skeleton, stage)
    if not groups:
        raise InputError(f"stage {stage.name}: no part trains; name at least one of {', '.join(PARTS)} under `train`")
    return open_strategy(
        Setup(skeleton=skeleton, source=source, groups=groups, stage=stage, context=context, loss=loss, experts=experts)
    )


def names_of_kept_parts(model: Any, stage: Stage) -> list[str]:
    """Trained parameters of the parts whose optimizer state the stage keeps."""
    family, names = family_of_model(model), [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and not is_head(name)
    ]
    kept = {part for part in PARTS if (training := getattr(stage.train, part)) and training.optimizer_state == "keep"}
    return [name for name in names if family.part_of(name) in kept]
