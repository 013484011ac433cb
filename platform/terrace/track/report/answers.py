"""Answers of the model to held-out questions, taken from the page that `terrace demo` leaves in the run directory.

The page is read as data, not copied: text comes out of the elements that carry it, and a picture is drawn anew from the few shapes
and numbers that it may hold. What else a changed page contains cannot reach the report.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from html.parser import HTMLParser

_SHAPES = {
    "rect": ("x", "y", "width", "height", "fill", "stroke", "stroke-width", "stroke-dasharray"),
    "circle": ("cx", "cy", "r", "fill", "stroke", "stroke-width"),
}
_PLAIN = re.compile(r"[-\w#. ]*")
_PICTURE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/=]+")
_TEXTS = ("task", "question", "answer", "expected")
MOST_ANSWERS = 48


@dataclass
class Answer:
    """`verdict` is right, wrong or open (free text that no rule can judge). `picture` is an SVG element, or ''."""

    verdict: str
    task: str = ""
    question: str = ""
    answer: str = ""
    expected: str = ""
    picture: str = ""


@dataclass
class _Card:
    answer: Answer
    depth: int = 1
    text: str = ""  # the field that text goes to now
    shapes: list[str] = field(default_factory=list)
    view_box: str = ""


def read_gallery(page: str) -> list[Answer]:
    """The answers of a gallery page, in its order; [] for a page that holds none."""
    reader = _GalleryReader()
    reader.feed(page)
    return reader.answers[:MOST_ANSWERS]


class _GalleryReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        self._card: _Card | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        classes = given.get("class", "").split()
        if self._card is None:
            if tag == "div" and "card" in classes:
                verdict = next((name for name in ("right", "wrong") if name in classes), "open")
                self._card = _Card(Answer(verdict))
            return
        card = self._card
        if tag == "div":
            card.depth += 1
            card.text = next((name for name in _TEXTS if name in classes), "")
        elif tag == "svg" and re.fullmatch(r"[-\d. ]+", given.get("viewbox", "")):
            card.view_box = given["viewbox"]
        elif tag == "image" and _PICTURE.fullmatch(given.get("href", "")):
            size = " ".join(f'{name}="{escape(given.get(name, ""))}"' for name in ("width", "height"))
            card.shapes.append(f'<image {size} href="{given["href"]}"/>')
        elif tag in _SHAPES:
            values = [(name, given[name]) for name in _SHAPES[tag] if name in given and _PLAIN.fullmatch(given[name])]
            card.shapes.append(f"<{tag} " + " ".join(f'{name}="{value}"' for name, value in values) + "/>")

    def handle_data(self, data: str) -> None:
        if self._card and self._card.text:
            field_name = self._card.text
            setattr(self._card.answer, field_name, getattr(self._card.answer, field_name) + data)

    def handle_endtag(self, tag: str) -> None:
        card = self._card
        if card is None or tag != "div":
            return
        card.depth, card.text = card.depth - 1, ""
        if card.depth == 0:
            if card.shapes and card.view_box:
                card.answer.picture = f'<svg class="picture" viewBox="{card.view_box}" role="img">{"".join(card.shapes)}</svg>'
            card.answer.expected = card.answer.expected.removeprefix("expected ")
            self.answers.append(card.answer)
            self._card = None
