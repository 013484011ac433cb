"""A recipe's values as YAML with comments that say what each part is for and where to go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

STAGE_WORDS = {
    "projector-warmup": "Only the projector moves, so that pictures and words meet before anything else changes. A checkpoint that\n"
    "# already answers about pictures does not need this stage.",
    "alignment": "Tower and projector learn to name what is seen; the language model waits.",
    "multimodal": "Everything on everything.",
    "long-context": "The same, in longer sequences.",
    "sft": "Your rows. Parts that are named train, every other part stays as it is.",
    "morl": "The model's own answers, judged by rules (docs/rl.md).",
}
HINTS = {
    "mixture": "shares of the sources; with temperature 1 times their sizes, so each row comes equally often",
    "sequence_length": "tokens of a pack, into which whole samples are packed",
    "pixels": "of a resized picture: more is sharper and dearer",
    "budget": "passes over the rows; or steps, samples, tokens",
    "batch": "packs of one optimizer step, over all workers",
    "train": "each part with its own peak learning rate",
    "checkpoint": "a killed run goes on from the newest",
    "resources": "`terrace plan` says what more GPUs bring",
}


def recipe_text(values: Mapping[str, Any], told: Sequence[tuple[str, str]], command: str, file: str) -> str:
    """The whole file."""
    stage = f":{values['stages'][-1]['name']}" if len(values["stages"]) > 1 else ""
    lines = [f"# Written by `{command}`. What was decided, and why:"]
    lines += [f"#   {what}: {why}" for what, why in told]
    lines += [
        "#",
        f"#   terrace validate {file}     every mistake, with its line",
        f"#   terrace inspect {file}{stage}     the samples as the model sees them",
        f"#   terrace run {file} --run-dir RUN",
        "#   terrace chat RUN",
        f"name: {_plain(values['name'])}",
        "",
        "model: # config.json and weights of the checkpoint",
        *(f"  {key}: {_plain(value)}" for key, value in values["model"].items()),
        f"tokenizer: {_plain(values['tokenizer'])}",
        "",
        "data:",
        "  sources: # `terrace ingest` says what was read and what was refused",
    ]
    for name, source in values["data"]["sources"].items():
        lines.append(f"    {_plain(name)}: {_plain(source)}")
    lines += ["", "stages:"]
    for number, stage in enumerate(values["stages"], start=1):
        lines += [f"  # {number}. " + STAGE_WORDS[stage["name"]].replace("\n#", "\n  #")]
        for place, (key, value) in enumerate(stage.items()):
            hint = f" # {HINTS[key]}" if key in HINTS and number == 1 else ""
            lines.append(f"  {'-' if place == 0 else ' '} {key}: {_plain(value)}{hint}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _plain(value: Any) -> str:
    """A value on one line, as YAML reads it back."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_plain(key)}: {_plain(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return text.removesuffix("...").strip()


def _number(value: float) -> str:
    """`1.0e-5` and not `1e-05`, which YAML 1.1 takes for text."""
    text = f"{value:.6g}"
    if "e" not in text:
        return text if "." in text else f"{text}.0"
    mantissa, _, power = text.partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(power)}"
