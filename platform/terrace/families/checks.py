"""What every family checks of a configuration that a recipe writes out: fields that are there, and the language model's arithmetic.

transformers gives a missing field the default of another model size (Qwen2.5-VL's vision width defaults to 3584, the
7B model has 1280), so every shape field must be written.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from terrace.errors import nearest
from terrace.families.interface import Finding

TEXT_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def complete(part: Mapping[str, Any], wanted: Iterable[str], at: tuple[str, ...]) -> Generator[Finding, None, bool]:
    """Yields what is missing or no positive number; returns whether the part may be checked further."""
    wanted, good = tuple(wanted), True
    for field in wanted:
        value = part.get(field)
        if value is None:
            good = False
            yield at, f"needs `{field}`: the default is another model's{nearest(field, set(part) - set(wanted), limit=0)}"
        elif not whole(value):
            good = False
            yield (*at, field), f"{value!r} is not a whole number from 1 on"
    return good


def head_count_fits(part: Mapping[str, Any], at: tuple[str, ...]) -> Iterator[Finding]:
    """Of a tower: its heads divide its width."""
    if part["hidden_size"] % part["num_attention_heads"]:
        yield (*at, "num_attention_heads"), f"{part['num_attention_heads']} heads do not divide hidden_size {part['hidden_size']}"


def head_size(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def mrope_section(text: Mapping[str, Any]) -> list[int] | None:
    """The split of a head's rotary frequencies over time, height and width, from either place transformers reads it."""
    for name in ("rope_parameters", "rope_scaling"):
        section = text[name].get("mrope_section") if isinstance(text.get(name), Mapping) else None
        if section:
            return list(section) if isinstance(section, list | tuple) else [section]
    return None


def language_rules(config: Mapping[str, Any], trained_tokenizer: bool, mrope: bool = False) -> Iterator[Finding]:
    """Both parts are maps; the language model's fields are there and its heads fit."""
    for name in ("text_config", "vision_config"):
        if not isinstance(config.get(name), dict):
            yield (), f"needs `{name}`, a map of shape fields{nearest(name, config, limit=0)}"
    text, at = config.get("text_config"), ("text_config",)
    wanted = TEXT_FIELDS if trained_tokenizer else (*TEXT_FIELDS, "vocab_size")
    if not isinstance(text, dict) or not (yield from complete(text, wanted, at)):
        return
    hidden, heads, key_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    if hidden % heads and not text.get("head_dim"):
        yield (*at, "num_attention_heads"), f"{heads} heads do not divide hidden_size {hidden}"
        return
    if heads % key_heads:
        yield (*at, "num_key_value_heads"), f"{key_heads} does not divide num_attention_heads {heads}"
    if not mrope:
        return
    section, size = mrope_section(text), head_size(text)
    if section is None:
        yield at, f"needs `rope_parameters` with `mrope_section`: three numbers that sum to {size // 2} (half a head)"
    elif len(section) != 3 or not all(map(whole, section)) or sum(section) * 2 != size:
        yield at, f"mrope_section {section} must be three numbers that sum to {size // 2} (half of head size {size})"
