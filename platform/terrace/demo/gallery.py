"""The contact sheet: held-out pictures with the model's own answers, as one PNG.

A box or point that the model gave is drawn solid, the true one dashed. Green is right, red is wrong. Text is set in Pillow's
own font, so that the sheet looks the same everywhere; characters the font lacks are left out.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from terrace.demo.results import TASKS, Results, Shown

INK, MUTED, FAINT = (28, 32, 40), (112, 118, 130), (228, 231, 236)
RIGHT, WRONG, TRUE = (22, 143, 82), (208, 52, 58), (120, 126, 138)
PAGE, CARD = (246, 247, 249), (255, 255, 255)

SCALE = 2  # the sheet is drawn for dense screens
COLUMNS, PER_KIND, MOST = 4, 2, 16
CARD_WIDTH, PICTURE_HEIGHT, PADDING, GAP = 268, 236, 16, 18
MARGIN = 36


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size * SCALE)


def write_sheet(results: Results, path: Path) -> Path:
    """Writes the contact sheet of `results.shown` and returns its path."""
    chosen = [item for item in results.shown if item.picture is not None and _can_be_set(item)]
    chosen = [item for place, item in enumerate(chosen) if sum(other.kind == item.kind for other in chosen[:place]) < PER_KIND]
    cards = [_card(item) for item in chosen[:MOST]]
    rows = [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)]
    heights = [max(card.height for card in row) + 20 * SCALE for row in rows]
    header = 92 * SCALE
    width = (2 * MARGIN + COLUMNS * CARD_WIDTH + (COLUMNS - 1) * GAP) * SCALE
    height = header + sum(heights) + (len(rows) - 1) * GAP * SCALE + MARGIN * SCALE
    sheet = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, 26), "What the model says about pictures it has never seen", 24, INK)
    line = f"{results.name} · {results.parameters / 1e6:.1f} M parameters"
    line += f" · {results.right} of {results.asked} held-out questions right" if results.asked else ""
    _write(draw, (MARGIN, 60), line, 14, MUTED)
    y = header
    for row, row_height in zip(rows, heights):
        for column, card in enumerate(row):
            x = (MARGIN + column * (CARD_WIDTH + GAP)) * SCALE
            shape = [x, y, x + CARD_WIDTH * SCALE, y + row_height]
            draw.rounded_rectangle(shape, 10 * SCALE, fill=CARD, outline=FAINT, width=SCALE)
            sheet.paste(card, (x + SCALE, y + 10 * SCALE))
        y += row_height + GAP * SCALE
    sheet.save(path, optimize=True)
    return path


def _can_be_set(item: Shown) -> bool:
    """Whether the font has what the card says: Latin text."""
    return all(ord(character) < 0x2100 for character in item.question + item.answer + item.expected)


def _card(item: Shown) -> Image.Image:
    """One picture with its marks, the question, and the answer below."""
    inner = CARD_WIDTH - 2 * PADDING
    question = _wrap(item.question.replace("\n", "  "), 13, inner, 3) if item.question else []
    said = _wrap(item.answer.replace("\n", " · ") or "(nothing)", 15, inner - 22, 4)
    wanted = [] if item.right or not item.expected else _wrap(f"expected {item.expected}".replace("\n", " · "), 12, inner - 22, 3)
    text_height = 22 + 18 * len(question) + 21 * len(said) + 16 * len(wanted)
    height = PICTURE_HEIGHT + 18 + text_height
    card = Image.new("RGB", ((CARD_WIDTH - 2) * SCALE, height * SCALE), CARD)
    draw = ImageDraw.Draw(card)
    picture = marked_picture(item, inner * SCALE, PICTURE_HEIGHT * SCALE)
    if picture.height < PICTURE_HEIGHT * SCALE * 0.9:  # a wide picture gets a mat, so that cards keep their line
        draw.rectangle([PADDING * SCALE, 6 * SCALE, (PADDING + inner - 2) * SCALE, (6 + PICTURE_HEIGHT) * SCALE], fill=PAGE)
    left, top = ((CARD_WIDTH - 2) * SCALE - picture.width) // 2, 6 * SCALE + (PICTURE_HEIGHT * SCALE - picture.height) // 2
    card.paste(picture, (left, top))
    y = PICTURE_HEIGHT + 16
    _write(draw, (PADDING, y), TASKS.get(item.kind, item.kind).upper(), 10, MUTED)
    y += 18
    for text in question:
        _write(draw, (PADDING, y), text, 13, MUTED)
        y += 18
    y += 2
    if item.right is None:
        _dot(draw, PADDING + 4, y + 7)
    else:
        _tick(draw, PADDING, y + 3, item.right)
    for text in said:
        _write(draw, (PADDING + 22, y), text, 15, INK)
        y += 21
    for text in wanted:
        _write(draw, (PADDING + 22, y), text, 12, MUTED)
        y += 16
    return card


def marked_picture(item: Shown, width: int, height: int) -> Image.Image:
    """The picture scaled into width x height pixels with the true mark dashed and the model's mark solid."""
    if item.picture is None:
        raise ValueError("this answer has no picture")
    ratio = min(width / item.picture.width, height / item.picture.height)
    size = (max(1, round(item.picture.width * ratio)), max(1, round(item.picture.height * ratio)))
    picture = item.picture.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    if item.expected_mark and len(item.expected_mark) == 4:
        _dashed_box(draw, _scaled(item.expected_mark, picture.size), INK)
    if item.found_mark:
        colour = TRUE if item.right is None else RIGHT if item.right else WRONG
        mark = _scaled(item.found_mark, picture.size)
        if len(mark) == 4:
            x1, x2 = sorted((mark[0], mark[2]))
            y1, y2 = sorted((mark[1], mark[3]))
            draw.rectangle([x1, y1, x2, y2], outline=(255, 255, 255), width=4 * SCALE)
            draw.rectangle([x1 + SCALE / 2, y1 + SCALE / 2, x2 - SCALE / 2, y2 - SCALE / 2], outline=colour, width=3 * SCALE)
        else:
            x, y = mark
            for radius, fill in ((9 * SCALE, (255, 255, 255)), (7 * SCALE, colour), (2.5 * SCALE, (255, 255, 255))):
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)
    return picture


def _scaled(mark: tuple[float, ...], size: tuple[int, int]) -> tuple[float, ...]:
    return tuple(value * size[axis % 2] for axis, value in enumerate(mark))


def _dashed_box(draw: ImageDraw.ImageDraw, box: tuple[float, ...], colour: tuple[int, int, int]) -> None:
    x1, y1, x2, y2 = box
    dash = 7 * SCALE
    for start in range(int(x1), int(x2), 2 * dash):
        for y in (y1, y2):
            draw.line([start, y, min(start + dash, x2), y], fill=colour, width=2 * SCALE)
    for start in range(int(y1), int(y2), 2 * dash):
        for x in (x1, x2):
            draw.line([x, start, x, min(start + dash, y2)], fill=colour, width=2 * SCALE)


def _tick(draw: ImageDraw.ImageDraw, x: float, y: float, right: bool) -> None:
    """A check mark or a cross in a disc, 14 pixels wide."""
    x, y, size = x * SCALE, y * SCALE, 14 * SCALE
    draw.ellipse([x, y, x + size, y + size], fill=RIGHT if right else WRONG)
    tick, cross = [[(0.28, 0.54), (0.44, 0.70), (0.74, 0.34)]], [[(0.32, 0.32), (0.68, 0.68)], [(0.68, 0.32), (0.32, 0.68)]]
    strokes = tick if right else cross
    for stroke in strokes:
        points = [(x + a * size, y + b * size) for a, b in stroke]
        draw.line(points, fill=(255, 255, 255), width=2 * SCALE, joint="curve")


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.ellipse([x * SCALE, y * SCALE, (x + 6) * SCALE, (y + 6) * SCALE], fill=TRUE)


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: tuple[int, int, int]) -> None:
    shown = "".join(character if ord(character) < 0x2000 else " " for character in text)
    draw.text((place[0] * SCALE, place[1] * SCALE), shown, fill=fill, font=_font(size))


def _wrap(text: str, size: int, width: int, most_lines: int) -> list[str]:
    """Lines of at most `width` pixels; what does not fit into `most_lines` ends in an ellipsis."""
    lines, line, font = [], "", _font(size)
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width * SCALE:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > most_lines:
        lines = lines[:most_lines]
        lines[-1] = lines[-1][:-1].rstrip(" .,") + " ..."
    for place, long_line in enumerate(lines):
        while font.getlength(lines[place]) > width * SCALE and len(lines[place]) > 4:
            lines[place] = long_line = long_line[:-1]
    return lines
