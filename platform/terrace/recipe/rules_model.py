"""Rules about the model and the tokenizer: sources of weights that exclude each other, and shapes that cannot be built.

A configuration is transformers' own map, in which a missing field takes the default of another model size
(Qwen2.5-VL's vision width defaults to 3584, the 7B model has 1280), so every shape field must be written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from terrace.recipe.errors import Path, Problem, nearest
from terrace.recipe.schema import Recipe

TEXT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VISION_FIELDS = {
    "qwen2_5_vl": ("hidden_size", "intermediate_size", "depth", "num_heads", "out_hidden_size"),
    "qwen2_vl": ("embed_dim", "mlp_ratio", "depth", "num_heads", "hidden_size"),
}
FIXED = {
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # what one preprocessing for all models rests on
CONFIG: Path = ("model", "config")


def check(recipe: Recipe) -> Iterator[Problem]:
    model, tokenizer = recipe.model, recipe.tokenizer
    if (model.config is None) == (model.pretrained is None):
        found = "`config` and `pretrained` exclude each other" if model.config is not None else "needs `config` or `pretrained`"
        yield Problem(("model",), f"{found}; give exactly one")
    if model.init is not None and model.pretrained is not None:
        yield Problem(("model", "init"), "only adds weights to a `config`; `pretrained` brings all of them")
    if (tokenizer.path is None) == (tokenizer.train_vocabulary_size is None):
        found = "has both" if tokenizer.path is not None else "needs one of"
        yield Problem(("tokenizer",), f"{found} `path` and `train_vocabulary_size`; give exactly one")
    if model.config is not None:
        yield from _config(model.config, model.architecture, trained_tokenizer=tokenizer.train_vocabulary_size is not None)


def head_size(text: dict[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def mrope_section(text: dict[str, Any]) -> list[int] | None:
    """The split of a head's rotary frequencies over time, height and width, from either place transformers reads it."""
    for name in ("rope_parameters", "rope_scaling"):
        section = (text.get(name) or {}).get("mrope_section")
        if section:
            return list(section)
    return None


def _config(config: dict[str, Any], architecture: str, trained_tokenizer: bool) -> Iterator[Problem]:
    if config.get("model_type", architecture) != architecture:
        yield Problem((*CONFIG, "model_type"), f"`{config['model_type']}` is not model.architecture `{architecture}`")
    for name in ("text_config", "vision_config"):
        if not isinstance(config.get(name), dict):
            yield Problem(CONFIG, f"needs `{name}`, a map of shape fields{nearest(name, config, limit=0)}")
    text, vision = config.get("text_config"), config.get("vision_config")
    if isinstance(text, dict):
        wanted = TEXT_FIELDS if trained_tokenizer else (*TEXT_FIELDS, "vocab_size")
        if (yield from _complete(text, wanted, (*CONFIG, "text_config"))):
            yield from _text(text)
    if isinstance(vision, dict) and (yield from _complete(vision, VISION_FIELDS[architecture], (*CONFIG, "vision_config"))):
        yield from _vision(vision, architecture)
        out = vision["out_hidden_size" if architecture == "qwen2_5_vl" else "hidden_size"]
        if isinstance(text, dict) and _whole(text.get("hidden_size")) and out != text["hidden_size"]:
            yield Problem(
                (*CONFIG, "vision_config"),
                f"the projector gives vectors of {out}, the language model takes {text['hidden_size']}",
            )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _complete(part: dict[str, Any], wanted: tuple[str, ...], at: Path) -> Iterator[Problem]:
    """Yields what is missing or no positive number; returns whether the part may be checked further."""
    good = True
    for field in wanted:
        value = part.get(field)
        if value is None:
            good = False
            yield Problem(at, f"needs `{field}`: the default is another model's{nearest(field, set(part) - set(wanted), limit=0)}")
        elif not _whole(value):
            good = False
            yield Problem((*at, field), f"{value!r} is not a whole number from 1 on")
    return good


def _text(text: dict[str, Any]) -> Iterator[Problem]:
    at = (*CONFIG, "text_config")
    hidden, heads, key_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    if hidden % heads and not text.get("head_dim"):
        yield Problem((*at, "num_attention_heads"), f"{heads} heads do not divide hidden_size {hidden}")
        return
    if heads % key_heads:
        yield Problem((*at, "num_key_value_heads"), f"{key_heads} does not divide num_attention_heads {heads}")
    section, size = mrope_section(text), head_size(text)
    if section is None:
        yield Problem(at, f"needs `rope_parameters` with `mrope_section`: three numbers that sum to {size // 2} (half a head)")
    elif len(section) != 3 or sum(section) * 2 != size:
        yield Problem(at, f"mrope_section {section} must be three numbers that sum to {size // 2} (half of head size {size})")


def _vision(vision: dict[str, Any], architecture: str) -> Iterator[Problem]:
    at = (*CONFIG, "vision_config")
    for field, value in FIXED.items():
        if vision.get(field, value) != value:
            yield Problem((*at, field), f"{vision[field]}: this platform's preprocessing is made for {value}")
    width = vision["hidden_size" if architecture == "qwen2_5_vl" else "embed_dim"]
    if width % (vision["num_heads"] * 4):
        yield Problem(
            (*at, "num_heads"),
            f"{width} / {vision['num_heads']} heads is no multiple of 4, which 2-D rotary positions need",
        )
    window = vision.get("window_size")
    if window is not None and (not _whole(window) or window % 28):
        yield Problem((*at, "window_size"), f"{window} is not a multiple of 28 pixels")
    for block in vision.get("fullatt_block_indexes") or []:
        if not isinstance(block, int) or not 0 <= block < vision["depth"]:
            yield Problem((*at, "fullatt_block_indexes"), f"there is no block {block}: depth is {vision['depth']}, counted from 0")
