"""What a line in the terminal is taken for, and what a stopped answer leaves."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image

from terrace.errors import InputError
from terrace.talk.chat_command import Chat


class Talker:
    """Says what it is told to say, and is stopped where that is an exception."""

    def __init__(self, *said: Any) -> None:
        self._said = said

    def prompt(self, turns: list[Any]) -> list[Any]:
        return turns

    def answer(self, _prompt: Any, _wishes: Any, hear: Any) -> None:
        for part in self._said:
            if isinstance(part, BaseException):
                raise part
            hear(0, part)


def chat(*said: Any) -> Chat:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    return Chat(Talker(*said), None, None, [picture.getvalue()])


@pytest.mark.parametrize(("line", "words"), [("/imagee a.png", "/image"), ("/hist", "/history"), ("/quti", "/quit"), ("/images", "/image")])
def test_an_order_that_is_mistyped_is_no_question(line: str, words: str) -> None:
    with pytest.raises(InputError, match=f"did you mean {words}\\?"):
        chat().obeys(line)


@pytest.mark.parametrize("line", ["/etc/passwd is what?", "/usr", "What is /image?", "a/b", "/ is a slash"])
def test_a_question_may_begin_with_a_slash(line: str) -> None:
    assert not chat().obeys(line)


@pytest.mark.parametrize(("said", "roles", "pictures"), [
    ((KeyboardInterrupt(),), [], 1), (("A re", KeyboardInterrupt()), ["user", "assistant"], 0),
    (("A red square.",), ["user", "assistant"], 0), ((), ["user", "assistant"], 0),
])  # fmt: skip
def test_a_question_that_was_stopped_before_a_word_came_was_never_asked(said: tuple[Any, ...], roles: list[str], pictures: int) -> None:
    talk = chat(*said)
    try:
        talk.ask("What is this?", lambda text: None)
    except KeyboardInterrupt:
        assert any(isinstance(part, KeyboardInterrupt) for part in said)
    assert [turn.role for turn in talk.turns] == roles
    assert len(talk.pictures) == pictures
    if roles:
        assert talk.turns[1].content == ("".join(part for part in said if isinstance(part, str)),)
