"""The three parts of a model (vision, projector, language) and the layers inside them, by parameter name.

Everything that speaks of parts (freezing, learning rates, layer-wise decay, memory planning, hand-over) asks here; which
name belongs where, the family says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_of_model
from terrace.recipe.schema import PARTS, PartName

HEADS = "heads."  # names of parameters beside the model's own


def part_parameters(model: Any) -> dict[PartName, list[tuple[str, Any]]]:
    """Per part its (name, parameter) pairs in the model's own order. A tied tensor appears once, under its first name. Heads
    beside the model (models.heads) are in none."""
    family = family_of_model(model)
    found: dict[PartName, list[tuple[str, Any]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        if name.startswith(HEADS):
            continue
        found[family.part_of(name)].append((name, parameter))
    return found


def transformer_blocks(model: Any) -> list[Any]:
    """The repeated blocks of vision, then those of language."""
    family = family_of_model(model)
    return [block for part in ("vision", "language") for block in family.blocks_of(model, part)]


def mtp_models(model: Any) -> list[Any]:
    """The language models of one layer inside MTP heads (models.heads); none where a model has no such heads."""
    return [layer.block for layer in getattr(getattr(model, "heads", None), "layers", ())]


def layer_number(name: str, last_layer: dict[PartName, int], family: FamilyModel) -> int:
    """Layer of a parameter inside its part: 0 for embeddings and what stands before the blocks, block i is i + 1, what
    follows the blocks is the last layer."""
    part = family.part_of(name)
    if part == "projector":
        return last_layer[part]
    number = family.block_number(name)
    if number is not None:
        return number + 1
    return 0 if "embed" in name or ".pre_" in name else last_layer[part]


def last_layers(names: Iterable[str], family: FamilyModel) -> dict[PartName, int]:
    """The highest layer number of each part: block count of vision (its head is the projector), block count + 1 of language."""
    depth: dict[PartName, int] = {"vision": 0, "projector": 0, "language": 1}
    for name in names:
        part, number = family.part_of(name), family.block_number(name)
        if number is not None:
            depth[part] = max(depth[part], number + (2 if part == "language" else 1))
    return depth


def has_weight_decay(name: str) -> bool:
    """Norm weights, layer scales, temperatures and all biases are not decayed; matrices, convolutions and embeddings are."""
    *_, module, leaf = ("", *name.split("."))
    alone = leaf.endswith("bias") or leaf.startswith(("lambda_", "logit_")) or leaf == "class_embedding"
    return not (alone or "norm" in module.lower() or module in ("ln_q", "pre_layrnorm"))


def has_words(name: str, wanted: Iterable[str]) -> bool:
    """Whether one of the wanted words, or dotted rows of words, stands in a parameter's name."""
    return any(f".{words}." in f".{name}." for words in wanted)
