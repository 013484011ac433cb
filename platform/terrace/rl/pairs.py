"""Preference rows as units: the prompt, then the chosen and the rejected answer, each with its end mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from terrace.data.template import encode_answer
from terrace.data.tokenizer import TextTokenizer
from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.generation.interface import Prompt, Response
from terrace.objectives.answers import AnswerPack
from terrace.objectives.grpo import response_rows
from terrace.objectives.reward_model import PairPack, answer_rows
from terrace.rl.units import TrainGroup, unit_pack


@dataclass(frozen=True)
class Pair:
    """A prompt and its answers as token ids: chosen first, then rejected (or any answers to be scored)."""

    prompt: Prompt
    answers: tuple[np.ndarray, ...]
    wanted: tuple[bool, ...] = (True, False)  # of each answer: whether it is to become more likely
    other: np.ndarray | None = None  # the answer to another prompt (kto)

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


def lay_out_answers(pairs: Sequence[Pair]) -> AnswerPack:
    """Pairs as one pack for log-probabilities: the last token of an answer is predicted and never fed."""
    found = _answer_pack([(pair.prompt, pair.answers, pair.wanted) for pair in pairs])
    others = [(pair.prompt, (pair.other,), (False,)) for pair in pairs if pair.other is not None]
    return replace(found, mismatched=_answer_pack(others)) if others else found


def _answer_pack(rows: Sequence[tuple[Prompt, tuple[np.ndarray, ...], tuple[bool, ...]]]) -> AnswerPack:
    nothing = np.zeros(0, np.float32)
    groups = [
        TrainGroup(prompt, tuple(Response(answer, nothing, True) for answer in answers), (0.0,) * len(answers))
        for prompt, answers, _ in rows
    ]
    example, units = unit_pack(groups)
    lengths = [[len(response.tokens) for response in group.responses] for group in groups]
    tokens = [response.tokens for group in groups for response in group.responses]
    return AnswerPack(
        pack=example,
        units=units,
        predicting=response_rows(units, lengths),
        tokens=np.concatenate(tokens).astype(np.int64),
        lengths=[length for of_group in lengths for length in of_group],
        wanted=[one for _, _, wanted in rows for one in wanted],
        answers=[len(answers) for _, answers, _ in rows],
        names=[row_name(*prompt.key, prompt.id) for prompt, _, _ in rows],
        sources=[prompt.key[0] for prompt, _, _ in rows],
        rows=sum(group.rows for group in groups),
        visual_tokens=sum(int(prompt.image_tokens.sum()) for prompt, _, _ in rows),
    )


def row_name(source: str, row: int, sample_id: str) -> str:
    """What a row is called wherever something is kept about it."""
    return f"{source}/{row}/{sample_id}"


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
