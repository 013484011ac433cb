"""ChatML, the conversation form of the Qwen models and of those built on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from terrace.families.interface import Family, Piece
from terrace.families.tools import as_plain_turns, refuse_tools

MARKS = {"end_of_text": "<|endoftext|>", "start_of_turn": "<|im_start|>", "end_of_turn": "<|im_end|>"}


class ChatML(Family):
    """`<|im_start|>role`, a line end, content, `<|im_end|>`, a line end. Only the end of an answer is a target.

    Text between two marks is encoded as one string, as Hugging Face tools do; only the assistant's header is cut off,
    because generation starts there.
    """

    default_system: ClassVar[str | None] = None  # stands before a conversation that has no system turn
    writes_tools: ClassVar[bool] = False  # in the form of Qwen2.5

    def plain_turns(self, messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        return as_plain_turns(messages, self.default_system) if self.writes_tools else refuse_tools(messages, self.name)

    def opening(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
        if self.default_system is not None and messages[0]["role"] != "system":
            yield from self.turn("system", [("text", self.default_system, False)], False)

    def turn(self, role: str, content: Iterable[Piece], supervised: bool) -> Iterator[Piece]:
        yield "mark", "start_of_turn", False
        yield "text", f"{role}\n", False
        if role == "assistant":
            yield "cut", None, False
        yield from content
        yield "mark", "end_of_turn", supervised
        yield "text", "\n", False

    def generation(self) -> Iterator[Piece]:
        yield "mark", "start_of_turn", False
        yield "text", "assistant\n", False


def chat_template(image: str, video: str | None = None, system: str | None = None) -> str:
    """The same form in Jinja, for inference tools: `image` and `video` are what stands for one of them."""
    opening = (
        "{% if loop.first and message['role'] != 'system' %}"
        f"<|im_start|>system\n{system}<|im_end|>\n{{% endif %}}"
        if system is not None
        else ""
    )
    videos = f"{{% elif item['type'] == 'video' %}}{video}" if video is not None else ""
    return (
        "{% for message in messages %}" + opening + "<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
        f"{{% if item['type'] == 'image' %}}{image}" + videos + "{% elif item['type'] == 'text' %}{{ item['text'] }}"
        "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
