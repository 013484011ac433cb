"""Rows of one question, prompt rows and preference rows, brought to turns: alpaca, ms-swift, TRL, KTO, the_cauldron, verl, OpenAI.

Each function takes the keys of its form and gives turns as `conversation.read_turns` reads them, `loss: false` where the form itself says
that an answer is not learnt (the prompt of TRL's prompt-completion and preference rows).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from terrace.data.sources.conversation import ROLES, parsed
from terrace.data.sources.fields import Fields, is_empty
from terrace.data.sources.refusals import Refusal

QUESTION_KEYS = ("instruction", "query", "question", "problem", "prompt")


@dataclass
class Turns:
    """What a row says: its turns, the reply that was not chosen, and what a reward compares with."""

    turns: list[Any]
    rejected: Any = None
    metadata: dict[str, Any] = field(default_factory=dict)
    flat: bool = False  # one question, not a conversation: pictures that no text asks for stand before it


def read_form(fields: Fields, kind: str) -> Turns | None:
    """The turns of a row, or None where it has none (captions, documents, text). Raises Refusal."""
    if isinstance(fields.look("input"), dict) and ("preferred_output" in fields or "non_preferred_output" in fields):
        return _openai_preference(fields)
    turns = fields.take("messages", "conversations", "conversation")
    if turns is not None:
        return _preference(fields, _as_turns(turns, "messages"), kind)
    if isinstance(texts := fields.look("texts"), list) and texts and all(isinstance(pair, dict) for pair in texts):
        return _pairs_of_texts(fields)
    questions = fields.of(QUESTION_KEYS)
    if not questions:
        return _implicit_prompt(fields) if "chosen" in fields or "rejected" in fields else None
    if questions[0] == "prompt":
        return _prompt(fields, kind)
    return _question(fields, questions[0], kind)


def label_of(fields: Fields, has_answer: bool, compared: bool) -> bool | None:
    """KTO's `label` (LLaMA-Factory's `kto_tag`): whether the row's one answer is wanted, None where it is not said.

    A row whose answer is not wanted is never learnt as one that is: it is refused unless its answer is `compared` (kind preference,
    without a rejected reply beside it)."""
    label = None
    for name in ("label", "kto_tag"):
        value = fields.look(name)
        if not has_answer or value is None:
            continue
        if value in (0, 1) or str(value).strip().lower() in ("true", "false"):
            fields.take(name)
            wanted = not (value == 0 or str(value).strip().lower() == "false")
            if label is not None and label != wanted:
                raise Refusal("bad_row", "`label` and `kto_tag` contradict each other")
            label = wanted
            if not wanted and not compared:
                raise Refusal("unwanted_answer", f"`{name}: {str(value).lower()}` says that this answer is not wanted; it is not trained")
    return label


# ---------------------------------------------------------------- forms


def _openai_preference(fields: Fields) -> Turns:
    inside = Fields(fields.take("input"), where="input")
    turns = _as_turns(inside.take("messages"), "input.messages")
    for name in ("tools", "functions", "system"):
        if name in inside and name not in fields:
            raise Refusal("unsupported", f"`input.{name}` of a preference row; write it as `{name}` of the row")
    inside.drop("parallel_tool_calls")
    inside.finish()
    chosen = _as_turns(fields.take("preferred_output"), "preferred_output")
    return Turns([*_not_learnt(turns), *chosen], _one_reply(fields.take("non_preferred_output"), turns))


def _preference(fields: Fields, turns: list[Any], kind: str) -> Turns:
    """Turns with what stands beside them: ms-swift's `rejected_response`, LLaMA-Factory's `chosen` and `rejected`, a solution."""
    if "chosen" in fields:
        chosen = _as_turns(fields.take("chosen"), "chosen")
        return Turns([*_not_learnt(turns), *chosen], _one_reply(fields.take("rejected"), turns))
    rejected = fields.take("rejected_response", "rejected")
    if rejected is None and "rejected_messages" in fields:
        rejected = _as_turns(fields.take("rejected_messages"), "rejected_messages")
    result = Turns(turns, None if rejected is None else _one_reply(rejected, turns[:-1]))
    _solution(fields, result, kind, ("solution",))
    return result


def _implicit_prompt(fields: Fields) -> Turns:
    """TRL's preference rows without `prompt`: two whole conversations that differ in their last reply."""
    chosen, rejected = _as_turns(fields.take("chosen"), "chosen"), _as_turns(fields.take("rejected"), "rejected")
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise Refusal("bad_row", "`chosen` and `rejected` without `prompt` are whole conversations that differ in their last turn alone")
    return Turns([*_not_learnt(chosen[:-1]), chosen[-1]], _one_reply(rejected[-1:], []))


def _prompt(fields: Fields, kind: str) -> Turns:
    """TRL's and verl's `prompt`: with a completion, with a chosen and a rejected reply, or with the solution of an RL task."""
    prompt = parsed(fields.take("prompt"), "prompt")
    turns = _as_turns(prompt, "prompt", role="user")
    flat = isinstance(prompt, str)
    if "chosen" in fields or "rejected" in fields:
        chosen = _as_turns(fields.take("chosen"), "chosen")
        if len(chosen) > len(turns) and chosen[: len(turns)] == turns:
            chosen = chosen[len(turns) :]
        elif flat and len(chosen) == 2:  # the prompt as text, and whole conversations
            chosen = chosen[1:]
        return Turns([*_not_learnt(turns), *chosen], _one_reply(fields.take("rejected"), turns), flat=flat)
    result = Turns(_not_learnt(turns), flat=flat)
    if kind != "prompt":
        answer = fields.take("completion", "response", "answer", "output")
        if answer is not None:
            result.turns = [*result.turns, *_as_turns(answer, "completion")]
            return result
    if isinstance(model := parsed(fields.look("reward_model"), "reward_model"), dict) and "ground_truth" in model:
        fields.take("reward_model")
        result.metadata["solution"] = model["ground_truth"]
        return result
    _solution(fields, result, kind, ("solution", "answer", "ground_truth"))
    return result


def _question(fields: Fields, name: str, kind: str) -> Turns:
    """Alpaca (`instruction`, `input`, `output`, `history`), `query` and `response`, `question` and `answer`, EasyR1's `problem`."""
    parts = [fields.take(name)]
    if name == "instruction":
        parts += [fields.take("input", "query")]
    if not all(part is None or isinstance(part, str) for part in parts):
        raise Refusal("bad_row", f"`{name}` is not text")
    turns: list[Any] = []
    for pair in fields.take("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refusal("bad_row", "`history` is not a list of pairs [question, answer]")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    turns.append(_turn("user", "\n".join(part for part in parts if part)))
    result = Turns(turns, flat=True)
    if "chosen" in fields:
        result.turns = [*_not_learnt(turns), *_as_turns(fields.take("chosen"), "chosen")]
        result.rejected = _one_reply(fields.take("rejected"), turns)
        return result
    if kind == "prompt":
        _solution(fields, result, kind, ("solution", "answer", "ground_truth", "response", "output"))
        return result
    answer = fields.take("output", "response", "answer", "completion")
    if answer is None:
        answer = fields.take("solution")
    elif (solution := fields.take("solution")) is not None:
        result.metadata["solution"] = solution
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None:
        result.turns = [*turns, *_as_turns(answer, "answer")]
    rejected = fields.take("rejected_response", "rejected")
    result.rejected = None if rejected is None else _one_reply(rejected, turns)
    return result


def _pairs_of_texts(fields: Fields) -> Turns:
    """FineVision and the_cauldron: `texts` of {"user", "assistant"}, all about the row's images."""
    turns: list[Any] = []
    for pair in fields.take("texts"):
        inside = Fields(pair, where="texts")
        turns += [_turn("user", inside.take("user")), _turn("assistant", inside.take("assistant"))]
        inside.finish()
    return Turns(turns, flat=True)


# ---------------------------------------------------------------- pieces


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _as_turns(value: Any, name: str, role: str = "assistant") -> list[Any]:
    """A reply or a prompt as turns: text, one turn, or a list of turns, perhaps as JSON text."""
    if isinstance(value, str):
        unpacked = parsed(value, name) if name.endswith("messages") else value
        if isinstance(unpacked, str):
            if name == "messages":
                raise Refusal("bad_row", "`messages` is text, not a list of turns")
            return [_turn(role, unpacked)]
        value = unpacked
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or is_empty(value):
        told = "is not a list with at least one turn" if name == "messages" else "is empty or no text"
        raise Refusal("bad_row", f"`{name}` {told}")
    if not all(isinstance(turn, dict) for turn in value):
        raise Refusal("bad_row", f"`{name}` holds a {type(next(t for t in value if not isinstance(t, dict))).__name__}, not turns")
    return value


def _not_learnt(turns: list[Any]) -> list[Any]:
    """The turns of a prompt: answers in it are given, not learnt."""
    return [{**turn, "loss": False} if _role(turn) == "assistant" else turn for turn in turns]


def _role(turn: dict[str, Any]) -> str | None:
    return ROLES.get(str(turn.get("role") or turn.get("from")).lower())


def _one_reply(value: Any, before: list[Any]) -> Any:
    """The content of the reply that was not chosen."""
    if isinstance(value, str) and value.strip():
        return value
    turns = _as_turns(value, "rejected")
    if len(turns) > 1 and turns[: len(before)] == before:
        turns = turns[len(before) :]
    if len(turns) == 2 and _role(turns[0]) == "user":
        turns = turns[1:]
    if len(turns) != 1:
        raise Refusal("unsupported", f"the rejected reply has {len(turns)} turns; a pair differs in one reply")
    return turns[0].get("content", turns[0].get("value"))


def _solution(fields: Fields, result: Turns, kind: str, names: tuple[str, ...]) -> None:
    """What a reward compares with, of a prompt."""
    if (value := fields.take(*names)) is not None:
        result.metadata["solution"] = value
