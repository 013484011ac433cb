"""Raw rows, as people really have them, to `Sample` plus the images they name. Pure: no file is opened here.

| keys of the row | form | becomes |
|---|---|---|
| `image` (or another spelling) + `text` / `caption` | caption row | running text: image, then the caption |
| `content` list of text and image items | interleaved document | running text |
| `texts` + `images` of equal length, one of each pair null | OBELICS document | running text |
| `text` | plain text | running text, taken literally |
| `messages` / `conversations` + `images`, `videos`, `objects`, `system`, `tools` | ms-swift, LLaVA, Qwen-VL, OpenAI | conversation |
| `instruction` + `input` + `output`, `query` + `response`, `question` + `answer` | alpaca and its like | conversation |
| `texts` of {`user`, `assistant`} + `images` | FineVision, the_cauldron | conversation |
| `prompt` + `completion` | TRL | conversation, learnt from the completion alone |
| ... + `chosen` + `rejected`, `rejected_response`, `preferred_output` | preference | conversation, `metadata.rejected` |
| `prompt` or user turns + `solution`, `answer`, `reward_model` | RL prompt (verl, EasyR1) | conversation, `metadata.solution` |

The items of a turn are joined as they stand, as chat templates do. A number of `<image>` that is not the number of images is refused, never
guessed; rows of one question, which have no other place, show their pictures before it. Text is text: a special token's spelling in it is
encoded letter by letter. A key that nobody reads refuses the row (`fields.py`), and so does anything that raises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from terrace.data.sources.conversation import check_answers, contents_name_images, parsed, read_turns, with_system_and_tools
from terrace.data.sources.fields import Fields, is_empty
from terrace.data.sources.forms import Turns, label_of, read_form
from terrace.data.sources.media import ImageReference, row_images, row_videos
from terrace.data.sources.placeholders import Item, PlaceholderReader
from terrace.data.sources.refusals import Refusal
from terrace.data.sources.running_text import caption_or_text, check_pictures, check_text, document, paired_document
from terrace.data.types import Sample

__all__ = ["ImageReference", "Rules", "convert_row", "row_id"]

RUNNING_TEXT = "text"
_SPECIAL = re.compile(r"(<\|[A-Za-z0-9_]{1,40}\|>)")
METADATA_KEYS = (
    "task", "tolerance", "licence", "license", "attribution", "source", "level", "category", "split", "reward", "data_source", "answer",
)  # fmt: skip


@dataclass
class Rules:
    """What the source's settings say of its rows, and a count of what they left out."""

    ignore: Collection[str] = ()
    placeholders: bool = True  # `<image>` in a turn's text is a placeholder
    special_tokens: bool = False  # `<|box_start|>` in a text is that token, not letters
    ignored: Counter[str] = field(default_factory=Counter)
    spelled: int = 0  # samples whose text spells special tokens

    @classmethod
    def of(cls, settings: Any) -> Rules:
        """The rules of a source, or of settings that have its fields."""
        return cls(tuple(settings.ignore), settings.placeholders == "read", settings.special_tokens == "tokens")


def convert_row(row: Any, default_id: str, kind: str, rules: Rules | None = None) -> tuple[Sample, list[ImageReference]]:
    """One raw row to a sample and its images, in the order of `Sample`'s image numbers. Raises Refusal, and nothing else."""
    if isinstance(row, list) and row and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise Refusal("bad_row", f"the row is a {type(row).__name__}, not a JSON object")
    try:
        return _converted(row, default_id, kind, rules or Rules())
    except Refusal:
        raise
    except Exception as error:  # one row of a stranger's file ends nothing but itself
        raise Refusal("bad_row", f"the row cannot be understood ({type(error).__name__}: {error})") from error


def _converted(row: dict[str, Any], default_id: str, kind: str, rules: Rules) -> tuple[Sample, list[ImageReference]]:
    fields = Fields(row, rules.ignore, rules.ignored)
    sample_id = row_id(row, default_id)
    metadata: dict[str, Any] = {}
    content, texts = parsed(fields.look("content"), "content"), fields.look("texts")
    form = read_form(fields, kind)
    inside = form.turns if form is not None else [{"content": content}]
    paired = form is None and isinstance(texts, list)
    pictures = fields.look("images")
    images = row_images(fields, kind, contents_name_images(inside), paired)
    reader = PlaceholderReader(images, row_videos(fields), parsed(fields.take("objects"), "objects"), rules.placeholders)
    if form is not None:
        messages = with_system_and_tools(_messages(form, reader, rules), fields)
        metadata |= form.metadata
        if form.rejected is not None:
            metadata["rejected"] = _rejected(form.rejected, reader)
        compared = kind == "preference" and form.rejected is None
        label = label_of(fields, any(message["role"] == "assistant" for message in messages), compared)
        if label is not None and compared:
            metadata["label"] = label
        check_answers(messages, is_prompt=kind == "prompt" or "solution" in metadata)
    elif isinstance(content, list):
        fields.take("content")
        messages = [{"role": RUNNING_TEXT, "content": document(content, reader, rules)}]
    elif paired:
        items = paired_document(fields.take("texts"), pictures if isinstance(pictures, list) else [None] * len(texts), reader)
        messages = [{"role": RUNNING_TEXT, "content": items}]
    else:
        messages = [{"role": RUNNING_TEXT, "content": caption_or_text(fields, reader, kind)}]
    for name in fields.of(METADATA_KEYS):
        metadata[name] = fields.take(name)
    fields.finish()
    if messages[0]["role"] == RUNNING_TEXT and kind != "picture":
        check_text(messages[0]["content"])
    check_pictures(kind, len(images))
    _special_tokens(messages, rules)
    return Sample(sample_id, kind, messages, plain_values(metadata)), images


def _messages(form: Turns, reader: PlaceholderReader, rules: Rules) -> list[dict[str, Any]]:
    messages = read_turns(form.turns, reader, rules)
    if form.flat and reader.nothing_shown:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = [*reader.rest(), *first["content"]]
    reader.finish()
    return messages


def _rejected(content: Any, reader: PlaceholderReader) -> list[Item]:
    """`metadata.rejected`: the content items of the reply that was not chosen. It is text alone."""
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise Refusal("empty_answer", "the rejected reply is empty or not text")
    tags = ("<bbox>", "<point>", "<ref-object>") if reader.objects is not None else ("<image>", "<video>")
    if any(tag in content for tag in tags) and reader.tags:
        raise Refusal("unsupported", "the rejected reply holds a placeholder; which image or box it means is not said. Write the numbers")
    return [{"type": "text", "text": content}]


def _special_tokens(messages: list[dict[str, Any]], rules: Rules) -> None:
    """Count a sample whose text spells special tokens, and make items of them where the source says so."""
    spelled = False
    for message in messages:
        if not any(item["type"] == "text" and "<|" in item["text"] and _SPECIAL.search(item["text"]) for item in message["content"]):
            continue
        spelled = True
        if rules.special_tokens:
            message["content"] = [part for item in message["content"] for part in _tokens_apart(item)]
    rules.spelled += spelled


def _tokens_apart(item: Item) -> list[Item]:
    if item["type"] != "text":
        return [item]
    parts = _SPECIAL.split(item["text"])
    return [{"type": "token", "token": part} if place % 2 else {"type": "text", "text": part} for place, part in enumerate(parts) if part]


def row_id(row: dict[str, Any], default_id: str) -> str:
    """The id that a row gives itself."""
    for key in ("id", "sample_id", "uid"):
        value = row.get(key)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return default_id


def plain_values(value: Any) -> Any:
    """Values that JSON can hold: dates and decimals as text, bytes left out."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): plain_values(entry) for key, entry in value.items() if not isinstance(entry, bytes)}
    if isinstance(value, (list, tuple)):
        return [plain_values(entry) for entry in value if not isinstance(entry, bytes)]
    return "" if is_empty(value) or isinstance(value, bytes) else str(value)
