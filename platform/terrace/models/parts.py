"""The three parts of a model, by parameter name: vision, projector, language; and the layer numbers inside them.

Everything that speaks of parts (freezing, learning rates, layer-wise decay, memory planning, hand-over) asks here, so
an architecture with other names is one more prefix in `_PREFIXES`. Names are transformers' own
(`model.visual.blocks.0.attn.qkv.weight`). Older checkpoints on the Hugging Face hub spell the same tensors
differently; `canonical_name` translates those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from terrace.errors import InputError
from terrace.recipe.schema import PARTS, PartName

# Order matters: the first matching prefix names the part.
_PREFIXES: tuple[tuple[str, PartName], ...] = (
    ("model.visual.merger.", "projector"),
    ("model.visual.", "vision"),
    ("model.language_model.", "language"),
    ("lm_head.", "language"),
)
_VISION_BLOCK = re.compile(r"^model\.visual\.blocks\.(\d+)\.")
_LANGUAGE_LAYER = re.compile(r"^model\.language_model\.layers\.(\d+)\.")


def part_of(parameter_name: str) -> PartName:
    """The part a parameter belongs to. Raises InputError for a name of no known part."""
    for prefix, part in _PREFIXES:
        if parameter_name.startswith(prefix):
            return part
    raise InputError(f"tensor {parameter_name!r} belongs to none of the parts {', '.join(PARTS)}")


def part_parameters(model: Any) -> dict[PartName, list[tuple[str, Any]]]:
    """Per part its (name, parameter) pairs in the model's own order. A tied tensor appears once, under its first
    name."""
    found: dict[PartName, list[tuple[str, Any]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        found[part_of(name)].append((name, parameter))
    return found


def layer_number(parameter_name: str, last_layer: dict[PartName, int]) -> int:
    """Layer of a parameter inside its part: 0 for embeddings, block i is i + 1, what follows the blocks is the last
    layer."""
    part = part_of(parameter_name)
    if part == "projector":
        return last_layer[part]
    match = (_VISION_BLOCK if part == "vision" else _LANGUAGE_LAYER).match(parameter_name)
    if match:
        return int(match.group(1)) + 1
    return 0 if "embed" in parameter_name else last_layer[part]


def last_layers(parameter_names: Iterable[str]) -> dict[PartName, int]:
    """The highest layer number of each part: block count of vision (its head is the projector), block count + 1 of
    language."""
    depth: dict[PartName, int] = {"vision": 0, "projector": 0, "language": 1}
    for name in parameter_names:
        if match := _VISION_BLOCK.match(name):
            depth["vision"] = max(depth["vision"], int(match.group(1)) + 1)
        elif match := _LANGUAGE_LAYER.match(name):
            depth["language"] = max(depth["language"], int(match.group(1)) + 2)
    return depth


def has_weight_decay(parameter_name: str) -> bool:
    """Norm weights and all biases are not decayed; matrices, convolutions and embeddings are."""
    if parameter_name.endswith(".bias"):
        return False
    module = parameter_name.split(".")[-2]
    return not (module.startswith("norm") or module.endswith("norm") or module == "ln_q")


def canonical_name(name: str) -> str:
    """A tensor name of any published spelling (`visual.…`, `model.layers.…`) as transformers 5 names it."""
    if name.startswith(("model.visual.", "model.language_model.", "lm_head.")):
        return name
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    if name.startswith("model."):
        return "model.language_model." + name.removeprefix("model.")
    return name


def published_name(name: str) -> str:
    """The inverse: the spelling in which Qwen publishes its weights, which every version of every loader reads."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def vision_blocks(model: Any) -> list[Any]:
    """The transformer blocks of the vision part, in order."""
    return list(model.model.visual.blocks)


def language_layers(model: Any) -> list[Any]:
    """The transformer layers of the language part, in order."""
    return list(model.model.language_model.layers)
