"""One plain form of what people and models write around mathematics: LaTeX wrappers, Unicode signs, Markdown.

Nothing here decides anything. A superscript stays a power (10⁵ is `10^{5}`, never 105), and a row break stays a row break
(`ROW`, inside `\\begin{...}` only), because a reading that loses either takes another answer for the right one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

CACHED_CHARACTERS = 2_000
ROW = "\ue000"  # a row break of a matrix: a private character that no text holds
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
_SIGNS = {
    "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "÷": "/", "−": "-", "–": "-", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "∞": r"\infty ",
    "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "±": r"\pm ", "∠": r"\angle ", "≈": r"\approx ", "\u03a9": r"\Omega ", "\u2126": r"\Omega ", "µ": "\u03bc", "℃": r"°C", "℉": r"°F",
    "→": r"\to ", "′": "'",
}  # fmt: skip
_ORDINARY = re.compile(r"[A-Za-z0-9 .,:;+\-=/()!?'\"%\n]*")  # a text of these is in its plain form already
_GROUPED = re.compile(r"(?<![.]\d)(?<=\d)(?:\\,|\\ | )(?=\d{3}(?!\d))")  # the thousands of 1\,520 and 1 520
_RELATIONS = ((r"\geqslant", r"\ge "), (r"\leqslant", r"\le "), (r"\geq", r"\ge "), (r"\leq", r"\le "), (r"\neq", r"\ne "))
_TEXT = re.compile(
    r"\\(?:text(?:bf|rm|it|tt|sf|normal|up)?|math(?:rm|bf|it|sf|tt|bb|cal|normal)|mbox|hbox|operatorname\*?|bm|boldsymbol|underline|bf|rm"
    r"|emph|fbox|boxed|ensuremath|phantom)\s?\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_SPACE = re.compile(r"\\(?:quad|qquad|displaystyle|textstyle|limits|nolimits|left|right|[bB]igg?[lrm]?|bf|rm)(?![A-Za-z])|\\[,;:! ]|~")
_STYLE = re.compile(
    r"\\(?:text)?color\s?\{[^{}]*\}|\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bfseries|itshape)(?![A-Za-z])|\\[hv]space\*?\s?\{[^{}]*\}"
)
_NOISE = re.compile(r"\\(?:checkmark|therefore|because|approx|ldots|dots|blacksquare|square|Box)(?![A-Za-z])")
_MARKDOWN = re.compile(r"</?(?:u|b|i|strong|em)>|\*\*|(?<![A-Za-z0-9])__|__(?![A-Za-z0-9])|`")


def plain(text: str) -> str:
    """`text` without wrappers: `$\\mathbf{12}\\,\\text{cm}^2$` is `12 cm^2`, `10⁵` is `10^{5}`, `√2` is `\\sqrt{2}`."""
    return _plain_of_short(text) if len(text) <= CACHED_CHARACTERS else _plain(text)


@lru_cache(maxsize=1024)
def _plain_of_short(text: str) -> str:
    return _plain(text)  # a judgement asks for the same few texts a dozen times


def _plain(text: str) -> str:
    if _ORDINARY.fullmatch(text):
        return re.sub(r"\s+", " ", _GROUPED.sub(",", text)).strip()
    text = re.sub(r"(\d)([¼½¾⅐-⅞])", r"\1 \2", _powers(text))
    text = unicodedata.normalize("NFKC", "".join(_SIGNS.get(letter, letter) for letter in text)).replace("\u2044", "/")
    text = re.sub(r"\\\\(?:\[[\d.]{1,5}\s?(?:pt|em|ex|mm|cm)\])?", ROW if "\\begin" in text else " ", text)
    text = re.sub(r"\{,\}", ",", text)
    text = _GROUPED.sub(",", text)
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = _MARKDOWN.sub("", text).replace("\\$", "\ue001").replace("\\#", " ")
    text = _STYLE.sub(" ", _SPACE.sub(" ", text))
    for _ in range(4):
        shorter = _TEXT.sub(r" \1 ", text)
        if shorter == text:
            break
        text = shorter
    text = re.sub(r"(?<!\\)\{\}", "", text)
    text = text.replace("$", " ") if text.count("$") % 2 == 0 else text
    text = text.replace("\ue001", "$").replace("\\%", "%")
    for name, plain_name in _RELATIONS:
        text = text.replace(name, plain_name)
    text = re.sub(r"\\(?:d|t|c)frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s?(\d)\s?(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:var|empty)(?:nothing|set)(?![a-z])", r"\\emptyset", text)
    text = re.sub(r"\^\s?\{?\s?\\(?:circ|degree)(?![a-z])\s?\}?|\\degree(?![a-z])", "°", text)
    return re.sub(r"\s+", " ", _NOISE.sub(" ", text)).strip().rstrip("\\")


def _powers(text: str) -> str:
    """Raised digits behind a base as `^{...}`, lowered ones as `_{...}`; a root sign as `\\sqrt`. A raised digit alone is a digit."""
    text = re.sub("(?<=[A-Za-z)\\]}])([" + "".join(_LOWERED) + "]+)", lambda m: "_{" + "".join(_LOWERED[c] for c in m.group(1)) + "}", text)
    text = re.sub(
        "(?<=[0-9A-Za-z)\\]}])([" + "".join(_RAISED) + "]+)", lambda m: "^{" + "".join(_RAISED[c] for c in m.group(1)) + "}", text
    )
    text = re.sub(r"√\s?(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}", text)
    return re.sub(r"√\s?(?=[({])", r"\\sqrt ", text)


def inside(text: str) -> str:
    """`text` without a pair of brackets, braces or quotation marks that encloses all of it."""
    text = text.strip()
    while (
        len(text) > 1
        and (text[0], text[-1]) in (("(", ")"), ("{", "}"), ("[", "]"), ('"', '"'), ("'", "'"), ("“", "”"))
        and _encloses(text)
    ):
        text = text[1:-1].strip()
    return text


def _encloses(text: str) -> bool:
    if text[0] not in "({[":
        return text[0] not in text[1:-1]
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 0:
            return place == len(text) - 1
    return False


def split_top(text: str, separators: str) -> list[str]:
    """`text` cut at the separator characters that stand in no bracket. `1,000` (three digits behind) is not cut."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter in separators and depth <= 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]]]
