"""Draws small pictures whose content is known: coloured shapes, printed signs, bar charts, windows with buttons.

A scene is drawn from its seed alone, so that a corpus, a test and a held-out picture are the same on every machine. Pictures
are drawn at twice their size and reduced, which smooths every edge. The light on a scene always fades the same way, from
warm (left) to cool (right) and from bright (top) to dim (bottom): a tiny vision tower finds out where a patch lies from
one linear map instead of learning it over thousands of steps.

One scene takes 2 to 5 ms on one core.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

SIZE = 224  # pixels of a side; every scene is square
SUPERSAMPLING = 2
CELLS = 3  # things lie in a 3 x 3 grid: at 84 x 84 pixels a cell is what one visual token sees
PITCH = SIZE / CELLS
PATCH = PITCH / 2  # letters stand one to a patch, so that each looks the same wherever it stands

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (224, 49, 49),
    "blue": (28, 103, 224),
    "green": (47, 158, 68),
    "yellow": (250, 196, 24),
    "purple": (140, 60, 200),
    "black": (40, 42, 48),
}
PAPER = (244, 244, 250)
BOARD = (255, 255, 255)
SHAPES = ("circle", "square", "triangle", "star")
WORDS = ("BUS", "CAFE", "HOTEL", "PARK", "STOP", "TAXI", "ZOO", "MILK")
BUTTONS = ("OK", "Save", "Open", "Help", "Send", "Quit")
TITLES = ("Notes", "Photos", "Music", "Mail")
PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One nameable thing of a scene; `box` is [x1, y1, x2, y2] in pixels of the picture."""

    kind: str  # shape, word, bar, button
    name: str  # "circle", "HOTEL", "red" (a bar), "Save" (a button)
    colour: str
    box: Box
    value: int = 0  # height of a bar

    @property
    def centre(self) -> tuple[int, int]:
        """The middle of the box as (x, y) pixels."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) // 2, (y1 + y2) // 2

    @property
    def place(self) -> str:
        """Where in the picture the thing lies, in words of a 3 x 3 grid."""
        x, y = self.centre
        return PLACES[min(2, 3 * y // SIZE)][min(2, 3 * x // SIZE)]


@dataclass(frozen=True)
class Scene:
    """A picture (RGB, SIZE x SIZE) and everything that is in it, from the top left to the bottom right."""

    kind: str  # shapes, sign, sum, chart, window
    picture: Image.Image
    things: tuple[Thing, ...]
    title: str = ""
    facts: dict[str, int] = field(default_factory=dict)


# ---------------------------------------------------------------- canvas


@lru_cache(maxsize=1)
def _light() -> Image.Image:
    """What every picture is multiplied with: x goes from warm to cool, y from bright to dim, by about 30 of 255 levels each."""
    x = np.linspace(0.0, 1.0, SIZE)[None, :, None]
    y = np.linspace(0.0, 1.0, SIZE)[:, None, None]
    colour = np.array([255.0, 253.0, 243.0]) + x * np.array([-34.0, -8.0, 12.0]) + y * np.array([-14.0, -30.0, -14.0])
    return Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))


@lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that no font file is needed and every machine draws the same letters."""
    return ImageFont.load_default(size=pixels * SUPERSAMPLING)


class _Canvas:
    """A drawing surface in picture pixels, `SUPERSAMPLING` times finer underneath."""

    def __init__(self) -> None:
        side = SIZE * SUPERSAMPLING
        self._image = Image.new("RGB", (side, side), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: list[tuple[float, float]], fill: tuple[int, int, int]) -> None:
        self._draw.polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], fill=fill)

    def ellipse(self, box: Box, fill: tuple[int, int, int]) -> None:
        self._draw.ellipse([v * SUPERSAMPLING for v in box], fill=fill)

    def rectangle(
        self, box: Box, fill: tuple[int, int, int], radius: int = 0, outline: tuple[int, int, int] | None = None
    ) -> None:
        self._draw.rounded_rectangle(
            [v * SUPERSAMPLING for v in box], radius * SUPERSAMPLING, fill=fill, outline=outline, width=SUPERSAMPLING
        )

    def line(self, start: tuple[int, int], end: tuple[int, int], fill: tuple[int, int, int]) -> None:
        self._draw.line(
            [(start[0] * SUPERSAMPLING, start[1] * SUPERSAMPLING), (end[0] * SUPERSAMPLING, end[1] * SUPERSAMPLING)],
            fill=fill,
            width=SUPERSAMPLING,
        )

    def text(
        self, centre: tuple[float, float], text: str, pixels: int, fill: tuple[int, int, int], bold: bool = False
    ) -> Box:
        """Writes `text` around `centre`; returns its box in picture pixels."""
        place = (centre[0] * SUPERSAMPLING, centre[1] * SUPERSAMPLING)
        stroke = SUPERSAMPLING // 2 if bold else 0
        self._draw.text(place, text, fill=fill, font=_font(pixels), anchor="mm", stroke_width=stroke)
        bounds = self._draw.textbbox(place, text, font=_font(pixels), anchor="mm", stroke_width=stroke)
        return tuple(round(v / SUPERSAMPLING) for v in bounds)  # type: ignore[return-value]

    def finish(self) -> Image.Image:
        return ImageChops.multiply(self._image.reduce(SUPERSAMPLING), _light())


# ---------------------------------------------------------------- scenes


def draw_shapes(seed: int, most: int = 4, colours: int | None = None) -> Scene:
    """1 to `most` shapes that do not touch, each wholly inside one cell of the grid and of a colour of its own, or, to be
    counted, of one of at most `colours` colours. Few shapes are more frequent than many: one thing is learned first.
    """
    rng = random.Random(seed)
    count = min(rng.randint(1, most), rng.randint(1, most + 1))
    chosen = sorted(rng.sample(range(CELLS * CELLS), count))
    palette = rng.sample(list(COLOURS), count if colours is None else colours)
    shades = palette if colours is None else rng.choices(palette, k=count)
    canvas, things = _Canvas(), []
    for cell, colour in zip(chosen, shades):
        side = round(PITCH * rng.uniform(0.6, 0.92))
        free = PITCH - side - 2
        left = round(cell % CELLS * PITCH + 1 + rng.uniform(0, free))
        top = round(cell // CELLS * PITCH + 1 + rng.uniform(0, free))
        shape = rng.choice(SHAPES)
        things.append(Thing("shape", shape, colour, _draw_shape(canvas, shape, colour, left, top, side)))
    return Scene("shapes", canvas.finish(), tuple(things))


def _draw_shape(canvas: _Canvas, shape: str, colour: str, left: int, top: int, side: int) -> Box:
    fill = COLOURS[colour]
    box = (left, top, left + side, top + side)
    if shape == "circle":
        canvas.ellipse(box, fill)
    elif shape == "square":
        canvas.rectangle(box, fill, radius=2)
    elif shape == "triangle":
        canvas.polygon([(left + side / 2, top), (left + side, top + side), (left, top + side)], fill)
    else:
        points = []
        for corner in range(10):
            radius = side / 2 if corner % 2 == 0 else side / 4.6
            angle = math.pi * (corner / 5 - 0.5)
            points.append((left + side / 2 + radius * math.cos(angle), top + side / 2 + radius * math.sin(angle)))
        canvas.polygon(points, fill)
    return box


def draw_sign(seed: int, most: int = 2) -> Scene:
    """1 to `most` signs in different rows, each with one printed word in a coloured frame, a letter to a patch.

    Letters are black on white in every frame: on boards of six colours each letter was six things to learn.
    """
    rng = random.Random(seed)
    count = rng.randint(1, most)
    canvas, things = _Canvas(), []
    rows, half = sorted(rng.sample(range(CELLS), count)), rng.randrange(2)
    for row, word, colour in zip(rows, rng.sample(WORDS, count), rng.sample(list(COLOURS), count)):
        first, line = rng.randint(0, 2 * CELLS - len(word)), 2 * row + half
        box = (
            round(first * PATCH) + 1, round(line * PATCH) + 1, round((first + len(word)) * PATCH) - 1, round((line + 1) * PATCH) - 1
        )  # fmt: skip
        canvas.rectangle(box, COLOURS[colour], radius=8)
        canvas.rectangle((box[0] + 4, box[1] + 4, box[2] - 4, box[3] - 4), BOARD, radius=5)
        for place, letter in enumerate(word):
            canvas.text(_patch_centre(first + place, line), letter, 34, COLOURS["black"], bold=True)
        things.append(Thing("word", word, colour, box))
    return Scene("sign", canvas.finish(), tuple(things))


def draw_sum(seed: int) -> Scene:
    """A printed sum of two digits, for example `3 + 4`, on a card; `facts` holds both numbers and the result."""
    rng = random.Random(seed)
    left, right = rng.randint(1, 5), rng.randint(1, 4)
    canvas = _Canvas()
    first, line = 2 * rng.randrange(CELLS - 1), rng.randrange(2 * CELLS)
    (x1, y), (x2, _) = _patch_centre(first, line), _patch_centre(first + 2, line)
    box = (max(2, round(x1) - 27), max(2, round(y) - 25), round(x2) + 27, min(SIZE - 2, round(y) + 25))
    canvas.rectangle(box, (255, 255, 255), radius=12, outline=(150, 150, 160))
    ink = COLOURS[rng.choice(["black", "blue", "purple"])]
    for place, text in enumerate((str(left), "+", str(right))):
        canvas.text(_patch_centre(first + place, line), text, 46, ink, bold=True)
    thing = Thing("word", f"{left} + {right}", "black", box)
    return Scene("sum", canvas.finish(), (thing,), facts={"left": left, "right": right, "result": left + right})


def draw_chart(seed: int, highest: int = 8) -> Scene:
    """Three bars of different colours and different whole heights over a line at every unit, numbered at every second."""
    rng = random.Random(seed)
    canvas, things = _Canvas(), []
    # Two thirds of a patch to a unit, from the middle of a patch on: no bar ends near the border of a patch.
    base, unit, left = 5.5 * PATCH, PATCH * 2 / 3, 28
    canvas.rectangle((2, 2, SIZE - 2, SIZE - 2), (255, 255, 255), radius=8)
    for value in range(highest + 1):
        y = round(base - value * unit)
        canvas.line((left, y), (SIZE - 8, y), (150, 150, 160) if value == 0 else (222, 224, 230))
        if value % 2 == 0:
            canvas.text((16, y), str(value), 18, (90, 90, 100))
    for place, (colour, value) in enumerate(zip(rng.sample(list(COLOURS), 3), rng.sample(range(1, highest + 1), 3))):
        x = round((place + 0.5) * PITCH) + (11 if place == 0 else 2)
        box = (x - 23, round(base - value * unit), x + 23, round(base))
        canvas.rectangle(box, COLOURS[colour])
        things.append(Thing("bar", colour, colour, box, value))
    return Scene("chart", canvas.finish(), tuple(things))


def draw_window(seed: int) -> Scene:
    """A window with a title, one to three labelled buttons of different colours, and grey lines that stand for text."""
    rng = random.Random(seed)
    canvas, things = _Canvas(), []
    canvas.rectangle((3, 3, SIZE - 3, SIZE - 3), (255, 255, 255), radius=8, outline=(160, 164, 174))
    canvas.rectangle((3, 3, SIZE - 3, 34), (92, 104, 128), radius=8)
    canvas.rectangle((3, 18, SIZE - 3, 34), (92, 104, 128))
    title = rng.choice(TITLES)
    canvas.text((SIZE / 2, 19), title, 22, (255, 255, 255), bold=True)
    count = rng.choices((1, 2, 3), (3, 4, 3))[0]
    slots = sorted(rng.sample(range(CELLS * CELLS), count))
    labels = dict(zip(slots, zip(rng.sample(BUTTONS, count), rng.sample(list(COLOURS), count))))
    for slot in range(CELLS * CELLS):
        x = (40, 112, 184)[slot % CELLS] + rng.randint(-1, 1)
        y = round(_patch_centre(0, 2 * (slot // CELLS) + 1)[1]) - 1 + rng.randint(-1, 1)
        if slot in labels:
            label, colour = labels[slot]
            box = (x - 31, y - 15, x + 31, y + 15)
            canvas.rectangle(box, COLOURS[colour], radius=6)
            canvas.text((x, y), label, 24, _ink_on(colour), bold=True)
            things.append(Thing("button", label, colour, box))
        else:
            for row, length in ((-7, 24), (5, rng.randint(8, 22))):
                canvas.rectangle((x - 27, y + row - 3, x - 27 + 2 * length, y + row + 3), (214, 218, 226), radius=3)
    return Scene("window", canvas.finish(), tuple(things), title=title)


def _patch_centre(column: int, line: int) -> tuple[float, float]:
    """The middle of a patch in picture pixels; there are 2 x CELLS to a side."""
    return (column + 0.5) * PATCH, (line + 0.5) * PATCH


def _ink_on(colour: str) -> tuple[int, int, int]:
    return COLOURS["black"] if colour == "yellow" else (255, 255, 255)


DRAWERS = {
    "shapes": draw_shapes,
    "sign": draw_sign,
    "sum": draw_sum,
    "chart": draw_chart,
    "window": draw_window,
}
