"""Turns as people write them to messages: roles, content lists, loss masks, tools and their calls.

| in a turn | becomes |
|---|---|
| `role` / `from`, `content` / `value` | role and items; a list names images, or means the row's next ones (or those of `index`) |
| `weight`, `loss`, `loss_scale`, `loss_mask`, `trainable`, `train`: 0, 1, true, false | `train: false` on answers that are not learnt |
| `tool_calls`, `function_call`; a turn of role `function_call` | items of type `tool_call` behind the answer's text |
| role `tool`, `function`, `observation`, `tool_response` | role `tool` |
| `reasoning_content`, `reasoning`, `thinking` | an item of type `reasoning` before the answer's text |

The row's `system` (or `system_prompt`) is the first message, its `tools` (or `functions`) one of role `tools` before it. How all of this is
written is the model family's business; what a family has no form for is refused when the source is indexed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from terrace.data.sources.fields import Fields, is_empty
from terrace.data.sources.media import image_reference, read_video
from terrace.data.sources.placeholders import Item, PlaceholderReader, merge_text
from terrace.data.sources.refusals import Refusal

Message = dict[str, Any]
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool",
    "function_call": "tool_call", "tool_call": "tool_call",
}  # fmt: skip
_MASKS = ("weight", "loss", "loss_scale", "loss_weight", "loss_mask", "trainable", "train", "training")
_TEXT_TYPES = ("text", "input_text", "output_text")
_IMAGE_TYPES = ("image", "image_url", "input_image", "image_path")
_IMAGE_KEYS = ("image", "image_url", "image_path", "path", "url", "image_base64", "base64", "source")


def read_turns(turns: Any, reader: PlaceholderReader, rules: Any) -> list[Message]:
    """Messages of a list of turns. `rules` has the source's `ignore` and the counter `ignored`. Raises Refusal."""
    turns = parsed(turns, "messages")
    if not isinstance(turns, list) or not turns:
        raise Refusal("bad_row", "`messages` is not a list with at least one turn")
    return [_message(turn, reader, rules) for turn in turns]


def with_system_and_tools(messages: list[Message], fields: Fields) -> list[Message]:
    """The messages with the row's own `system` and `tools` before them."""
    system = fields.take("system", "system_prompt")
    tools, functions = fields.take("tools"), fields.take("functions")
    if system is not None:
        if not isinstance(system, str):
            raise Refusal("bad_row", f"`system` is a {type(system).__name__}, not text")
        content: list[Item] = [{"type": "text", "text": system}]
        if messages[0]["role"] == "system":
            if messages[0]["content"] != content:
                raise Refusal("bad_row", "the row has a `system` and its first turn is another system prompt; which one counts?")
        else:
            messages = [{"role": "system", "content": content}, *messages]
    if tools is not None and functions is not None:
        raise Refusal("bad_row", "the row has `tools` and `functions`; which of them count?")
    listed = _tool_list(tools if tools is not None else functions, wrap=tools is None)
    return [{"role": "tools", "content": [], "tools": listed}, *messages] if listed else messages


def check_answers(messages: list[Message], is_prompt: bool) -> None:
    """Refuse a conversation that has nothing to learn from."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers and not is_prompt:
        raise Refusal("empty_answer", "the conversation has no assistant turn (a prompt for an RL stage has the kind `prompt`)")
    for answer in answers:
        if not any(has_text(item) or item["type"] in ("box", "point", "tool_call") for item in answer["content"]):
            raise Refusal("empty_answer", "an assistant turn is empty")
    if answers and not is_prompt and not any(answer.get("train", True) for answer in answers):
        raise Refusal("unwanted_answer", "every answer is masked (`weight: 0`, `loss: false`), so there is nothing to learn")
    if messages[-1]["role"] in ("system", "tools") or not any(message["role"] not in ("system", "tools") for message in messages):
        raise Refusal("empty_text", "the conversation ends in a system turn")


def has_text(item: Item) -> bool:
    return item["type"] == "text" and bool(item["text"].strip())


def parsed(value: Any, name: str) -> Any:
    """A list or object that Parquet and CSV often hold as JSON text."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Refusal("bad_row", f"`{name}` is text that begins like JSON and is none ({error})") from error


def contents_name_images(turns: Any) -> bool:
    """Whether content items of these turns name images themselves."""
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and any(not is_empty(part.get(name)) for name in ("image", "image_url", "video", "frames")):
                return True
    return False


# ---------------------------------------------------------------- one turn


def _message(turn: Any, reader: PlaceholderReader, rules: Any) -> Message:
    if not isinstance(turn, dict):
        raise Refusal("bad_row", f"a turn is a {type(turn).__name__}, not a JSON object with `role` and `content`")
    fields = Fields(turn, rules.ignore, rules.ignored, "messages")
    name = fields.take("role", "from")
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise Refusal("bad_row", f"a turn has the role {name!r}; known are system, user, assistant, tool and their usual other names")
    if ROLES.get(str(fields.look("from")).lower()) == role:
        fields.drop("from")
    content, calls = fields.take("content", "value"), []
    if role == "tool_call":
        role, calls, content = "assistant", read_calls(content, "content"), None
    items = _content(content, reader, rules)
    if role == "tool" and any(item["type"] != "text" for item in items):
        raise Refusal("unsupported", "a tool's result holds an image; only its text can be written")
    if (thought := fields.take("reasoning_content", "reasoning", "thinking")) is not None:
        if role != "assistant" or not isinstance(thought, str):
            raise Refusal("bad_row", "`reasoning_content` is the text of an assistant's turn")
        items = [{"type": "reasoning", "text": thought}, *items]
    if (made := fields.take("tool_calls")) is not None:
        calls += read_calls(made, "tool_calls")
    if (made := fields.take("function_call")) is not None:
        calls += read_calls(made, "function_call")
    if calls and role != "assistant":
        raise Refusal("bad_row", f"a turn of role {role} has tool calls; only the assistant calls tools")
    message: Message = {"role": role, "content": items + calls}
    if not _trained(fields, role):
        message["train"] = False
    fields.drop("name", "tool_call_id")  # which call a result answers shows in the order
    fields.finish()
    return message


def _trained(fields: Fields, role: str) -> bool:
    """Whether a turn is to be learnt, by whatever mask it carries."""
    told = set()
    for name in _MASKS:
        value = fields.take(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise Refusal("unsupported", f"`{name}: {str(value)[:40]}` of a turn: it is learnt wholly (1, true) or not at all (0, false)")
        told.add(bool(value))
    if len(told) > 1:
        raise Refusal("bad_row", "the masks of one turn (`weight`, `loss`, ...) contradict each other")
    if told == {True} and role != "assistant":
        raise Refusal("unsupported", f"a turn of role {role} is marked as one to learn; only answers are (or `supervise: all_text`)")
    return False not in told or role != "assistant"


def read_calls(value: Any, name: str) -> list[Item]:
    """Items of tool calls: OpenAI's {"function": {"name", "arguments"}}, or {"name", "arguments"}; one or a list; perhaps as JSON text."""
    value = parsed(value, name)
    calls: list[Item] = []
    for call in value if isinstance(value, list) else [value]:
        call = parsed(call, name)
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Refusal("bad_row", f"`{name}` holds {str(call)[:80]!r}, not a call with `name` and `arguments`")
        arguments = inner.get("arguments", inner.get("parameters"))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise Refusal("bad_row", f"the arguments of the call of {inner['name']!r} are no JSON ({error})") from error
        calls.append({"type": "tool_call", "name": inner["name"], "arguments": {} if arguments is None else arguments})
    return calls


def _tool_list(value: Any, wrap: bool) -> list[dict[str, Any]]:
    """The tools that a row offers. `wrap`: OpenAI's older `functions`, which stand in `tools` as {"type": "function", "function": ...}."""
    if value is None:
        return []
    value = parsed(value, "tools")
    listed = [parsed(entry, "tools") for entry in value] if isinstance(value, list) else value
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise Refusal("bad_row", f"`tools` is {str(value)[:60]!r}, not a list of tools (JSON schemas of functions)")
    return [{"type": "function", "function": entry} for entry in listed] if wrap else listed


# ---------------------------------------------------------------- content


def _content(content: Any, reader: PlaceholderReader, rules: Any) -> list[Item]:
    if content is None:
        return []
    if isinstance(content, str):
        return reader.read(content)
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise Refusal("bad_row", f"a turn's content is a {type(content).__name__}, not text or a list")
    return merge_text([item for part in content for item in read_part(part, reader, rules)])


def read_part(part: Any, reader: PlaceholderReader, rules: Any) -> Iterable[Item]:
    """The items of one entry of a content list. Its text is text: `<image>` stands for itself beside image items."""
    if isinstance(part, str):
        return reader.read(part, media=False)
    if not isinstance(part, dict):
        raise Refusal("bad_row", f"a content item is a {type(part).__name__}, not a JSON object with `type`")
    fields = Fields(part, rules.ignore, rules.ignored, "content")
    kind = fields.take("type")
    if kind is None:
        kind = next((name for name in ("text", "image", "image_url", "video") if name in fields), None)
    if kind in _TEXT_TYPES:
        text = fields.take("text", "value", "content")
        if not isinstance(text, str):
            if text is None and "text" in part and part["text"] == "":
                return []
            raise Refusal("bad_row", "a content item of type text without `text`" if text is None else "a content item's text is no text")
        items = reader.read(text, media=False)
    elif kind in _IMAGE_TYPES:
        items = [_image(fields, reader)]
    elif kind == "video":
        items = [_video(fields, reader)]
    else:
        raise Refusal("unsupported", f"a content item of type {kind!r}; known are text, image, image_url and video")
    fields.drop("index", "detail")
    fields.finish()
    return items


def _image(fields: Fields, reader: PlaceholderReader) -> Item:
    """An image item: it names its image itself, or it stands for the next of the row's images, or for that of its `index`."""
    value = fields.take(*_IMAGE_KEYS)
    if isinstance(value, int) and not isinstance(value, bool):
        return reader.image_at(value)
    if value is not None:
        return reader.named_image(image_reference(value))
    index = fields.take("index")
    return reader.next_image() if index is None else reader.image_at(index)


def _video(fields: Fields, reader: PlaceholderReader) -> Item:
    times = {name: fields.take(name) for name in ("fps", "sample_fps", "timestamps")}
    value = fields.take("video", "frames", "path", "url")
    return reader.next_video() if value is None else reader.named_video(read_video(value, times))
