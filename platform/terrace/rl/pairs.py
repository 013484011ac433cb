"""Preference rows as units: the prompt, then the chosen and the rejected answer, each with its end mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from terrace.data.template import encode_answer
from terrace.data.tokenizer import TextTokenizer
from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.generation.interface import Prompt, Response
from terrace.objectives.reward_model import PairPack, answer_rows
from terrace.rl.units import TrainGroup, unit_pack


@dataclass(frozen=True)
class Pair:
    """A prompt and its answers as token ids: chosen first, then rejected (or any answers to be scored)."""

    prompt: Prompt
    answers: tuple[np.ndarray, ...]

    @property
    def rows(self) -> int:
        return len(self.prompt.input_ids) + sum(len(answer) for answer in self.answers)


def answer_tokens(text: str, tokenizer: TextTokenizer, family: Family) -> np.ndarray:
    """int32 [T]: an answer as the assistant's turn has it, with its end mark."""
    return np.asarray(encode_answer(text, tokenizer, family), np.int32)


def text_of_items(items: Sequence[dict[str, Any]], sample_id: str) -> str:
    """The text of content items. Raises InputError for an answer that holds more than text."""
    if any(item["type"] != "text" for item in items):
        raise InputError(f"sample {sample_id}: an answer of a preference pair is text, without boxes or images")
    return "".join(item["text"] for item in items)


def pack_pairs(pairs: Sequence[Pair], sequence_length: int) -> list[list[Pair]]:
    """Pairs in order into packs of at most `sequence_length` rows; a longer one is a pack of its own."""
    packs: list[list[Pair]] = []
    filled = sequence_length + 1
    for pair in pairs:
        if filled + pair.rows > sequence_length:
            packs.append([])
            filled = 0
        packs[-1].append(pair)
        filled += pair.rows
    return packs


def lay_out(pairs: Sequence[Pair]) -> PairPack:
    """Pairs as one pack. Answers are fed whole, because the score stands at their last token."""
    nothing = np.zeros(0, np.float32)
    # unit_pack leaves out the last token of a response, so one that is never read is put behind each answer.
    groups = [
        TrainGroup(
            pair.prompt,
            tuple(Response(np.append(answer, 0).astype(np.int32), nothing, True) for answer in pair.answers),
            (0.0,) * len(pair.answers),
        )
        for pair in pairs
    ]
    example, units = unit_pack(groups)
    return PairPack(
        pack=example,
        units=units,
        answers=answer_rows(units) if pairs else [],
        rows=sum(pair.rows for pair in pairs),
        visual_tokens=sum(int(pair.prompt.image_tokens.sum()) for pair in pairs),
        sources=[pair.prompt.key[0] for pair in pairs],
    )
