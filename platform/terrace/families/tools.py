"""Tools, their calls and their results as text: the form of Qwen2.5's chat template, which the models of that line were trained in.

The tools stand behind the system prompt, a call is JSON between `<tool_call>` marks behind the answer's text, and results come back in a
turn of the user, several of them in one. `reasoning_content` has no form in that template: it would be dropped, so it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures"
    " within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\nFor each function call, return a json object with function name and"
    " arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def as_plain_turns(messages: Sequence[Message], default_system: str | None) -> list[Message]:
    """The conversation as turns of system, user and assistant alone. Raises ValueError for what has no form."""
    turns = list(messages)
    if turns[0]["role"] == "tools":
        turns = [_system_with_tools(turns[0]["tools"], turns[1:], default_system), *_behind_system(turns[1:])]
    plain: list[Message] = []
    results: list[str] = []
    for turn in turns:
        if turn["role"] == "tool":
            results.append(f"<tool_response>\n{_text(turn)}\n</tool_response>")
            continue
        if results:
            plain.append(_results(results))
            results = []
        plain.append(_with_calls(turn) if turn["role"] == "assistant" else turn)
    return [*plain, _results(results)] if results else plain


def refuse_tools(messages: Sequence[Message], name: str) -> Sequence[Message]:
    """The same messages, for a family whose form knows nothing of tools. Raises ValueError where there are any."""
    for message in messages:
        kinds = {item["type"] for item in message["content"]}
        if message["role"] in ("tools", "tool") or kinds & {"tool_call", "reasoning"}:
            raise ValueError(f"{name} has no form for tools, their calls and results, or reasoning_content; write them as text")
    return messages


def call_text(item: Mapping[str, Any]) -> str:
    """One call as it stands in an answer."""
    return f'<tool_call>\n{{"name": "{item["name"]}", "arguments": {_json(item["arguments"])}}}\n</tool_call>'


def _with_calls(turn: Message) -> Message:
    content = turn["content"]
    if any(item["type"] == "reasoning" for item in content):
        raise ValueError(
            "the chat template has no form for `reasoning_content`; write it into the answer's text (`<think>...</think>`), or leave"
            " it out with `ignore: [reasoning_content]`"
        )
    calls = [call_text(item) for item in content if item["type"] == "tool_call"]
    if not calls:
        return turn
    said = [item for item in content if item["type"] != "tool_call"]
    text = ("\n" if said else "") + "\n".join(calls)
    return {**turn, "content": [*said, {"type": "text", "text": text}]}


def _system_with_tools(tools: Sequence[Any], behind: Sequence[Message], default_system: str | None) -> Message:
    own = behind[0]["content"] if behind and behind[0]["role"] == "system" else [{"type": "text", "text": default_system or ""}]
    listed = "".join("\n" + _json(tool) for tool in tools)
    return {"role": "system", "content": [*own, {"type": "text", "text": _TOOLS.format(listed)}]}


def _behind_system(turns: Sequence[Message]) -> Sequence[Message]:
    return turns[1:] if turns and turns[0]["role"] == "system" else turns


def _results(results: Sequence[str]) -> Message:
    return {"role": "user", "content": [{"type": "text", "text": "\n".join(results)}]}


def _text(turn: Message) -> str:
    return "".join(item["text"] for item in turn["content"])


def _json(value: Any) -> str:
    """As the `tojson` of chat templates writes it."""
    return json.dumps(value, ensure_ascii=False)
