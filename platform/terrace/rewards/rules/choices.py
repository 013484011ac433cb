"""Multiple choice: which letters an answer names. Rewards and suites share this file.

Evidence is collected, and an answer counts only if it all points to the same letters:
- the whole answer is letters, or the words of a choice, or both (`B`, `(b)`, `A, C`, `a green pear`, `B. a green pear`);
- the answer begins with a letter and goes on with an explanation (`B, because ...`), the commonest form;
- "the answer is B", "option B", "B is correct", 选B; a last sentence that ends in a letter ("so C");
- failing all of these, the only letter, or the only choice's words, that the text holds.
A letter that is denied ("not B", "B is wrong") is no evidence; an answer that abstains, hedges ("A or B") or takes back what it
said ("A. Wait, no, B") names none. "A" before a lower-case word is the article unless that word can follow a name ("A is").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_uppercase

from terrace.rewards.rules.latex import plain

CHARACTERS = 4_000
# what may follow the letter A; before any other lower-case word A is the article
_VERBS = "is|are|was|because|since|as|and|or|nor|it|seems|looks|fits|must|should|would|matches|appears|has|shows|that|but|not|alone|only"
_LETTER = rf"(?<![A-Za-z'’])(?:A(?!\s+(?!(?:{_VERBS})\b)[a-z])|I(?!\s+[a-z]|'|’)|[B-HJ-Z])(?![A-Za-z'’]|\s?=|\^)"
_LIST = rf"\(?{_LETTER}\)?(?:\s?(?:,|&|;|、|和|\band\b|, and\b)?\s?\(?{_LETTER}\)?){{0,7}}"
_WHOLE = re.compile(
    r"[(\[]?\s?([A-Za-z])\s?[)\]]?(?:(?:\s?(?:,|&|;|、|和|and|, and)\s?|\s)[(\[]?([A-Za-z])[)\]]?){0,7}|(?:\(?[A-H]\)?){2,8}", re.IGNORECASE
)
_START = re.compile(
    rf"^\s*[(\[]?({_LETTER})\s?(?:[)\].:,;!\n]|\s[-–—]\s|$|\s(?:because|since|as|is|seems|it|and nothing|best)\b|，|。|：|、)"
)
_MARK = re.compile(
    r"(?i:\b(?:answers?|options?|choices?|choose|chose|pick|select|go with|it is|it's|it must be|must be|is|are)\b|答案|选项?|选择)"
    r"(?i:\s?(?:is|are|be|:|：|是|为|would|clearly|probably|definitely|option|choice|letter|the|best|correct))*\s*"
    rf"({_LIST})(?!\s?[-+=*/^])",
)
_STRONG = re.compile(r"answer|option|choice|choose|chose|pick|select|go with|must be|it is|it's|答案|选", re.IGNORECASE)
_CORRECT = re.compile(
    rf"[(\[]?({_LETTER})[)\]]?(?:[^.\n]{{0,40}}?)?\s(?:is|seems|looks)\s(?:clearly\s)?(?:the\s)?(?:correct|right|best|answer|true)\b"
    rf"|({_LETTER})\s?(?:正确|是正确)"
)
_LAST = re.compile(rf"(?:\b(?:so|therefore|thus|hence|think|is|are|be|:)|[,:，：])\s*[*(\[]*({_LIST})[)\]*]*\s?[.!。]?\s*$")
_BEFORE_DENIED = (
    r"not|nor|neither|exclud\w+|ruling out|rule out|eliminat\w+|except|without|rather than|instead of|than"
    r"|(?i:any|all|anything|everything|none) but|can't be|cannot be|couldn't be|isn't|about|consider\w*"
)
_COUPLED = rf"({_LIST})(?:\s(?:n?or|and)\s({_LETTER}))?"
_DENIED = re.compile(
    rf"\b(?:{_BEFORE_DENIED})\s+(?:option\s|choice\s)?{_COUPLED}"
    rf"|{_COUPLED}\s?(?:\([^)]*\)\s)?(?:is|are|was|seems?|looks?|has|have|does|do|cannot|can't|isn't|aren't|doesn't|don't)"
    r"\s?(?:clearly\s|also\s)?(?:wrong|incorrect|not|no\b|false|out|n't|impossible)"
    rf"|({_LETTER})\s?(?:错|不对|不正确|错误)"
)
_ABSTAINS = re.compile(
    r"\b(?:can't tell|cannot tell|not sure|unsure|don't know|do not know|cannot (?:see|determine|answer)|no idea|hard to say)\b"
    r"|不知道|无法",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(r"\b(?:wait|actually|no,|correction|sorry|hmm|on second thought)\b", re.IGNORECASE)
_HEDGE = re.compile(rf"{_LETTER}[)\]]?\s(?:or)\s[(\[]?{_LETTER}|\bor not\b|\beither\b|或", re.IGNORECASE)


def gold_letters(solution: str, choices: Mapping[str, str]) -> tuple[frozenset[str], dict[str, str]] | None:
    """The letters of a solution such as `B`, `(b)`, `B. 6`, `A, C`, `ACD`, and its choices (one that is written behind the
    letter is added); None where the solution is no choice."""
    text = plain(solution).strip()
    single = re.fullmatch(r"\(?\s?([A-Za-z])\s?\)?[.):]?", text)
    if single and (single.group(1).isupper() or single.group(1).upper() in choices):
        return frozenset({single.group(1).upper()}), dict(choices)
    written = re.fullmatch(r"(?:\(([A-H])\)|([A-H])[.):])\s+(\S.{0,300})", text)
    if written:
        letter = written.group(1) or written.group(2)
        return frozenset({letter}), {letter: written.group(3), **choices}
    letters = re.fullmatch(r"([A-H])(?:(?:\s?[,;、&]\s?|\s?,?\s?and\s|\s?)([A-H])){1,7}", text)
    if letters:
        named = re.findall("[A-H]", text)
        if len(set(named)) == len(named) and (choices or named == sorted(named)) and set(named) <= set(choices or ascii_uppercase):
            return frozenset(named), dict(choices)
    return None


def named_letters(text: str, choices: Mapping[str, str]) -> frozenset[str]:
    """The letters that an answer's text names, empty for none or for an answer that does not decide."""
    cleaned = plain(text[:CHARACTERS].replace("\n", " \ue002 ")).replace(" \ue002 ", "\n").replace("\ue002", "\n").strip()
    cleaned = re.sub(r"^[#>\s]+", "", cleaned)
    letters = _whole(cleaned, choices)
    if letters:
        return letters
    by_words = [letter for letter, words in choices.items() if _same_words(words, cleaned)]
    if by_words:
        return frozenset(by_words) if len(by_words) == 1 else frozenset()
    allowed = set(choices) or set(ascii_uppercase)
    return _decided(cleaned, allowed) or (_by_words(cleaned, choices) if choices else frozenset())


def _whole(text: str, choices: Mapping[str, str]) -> frozenset[str]:
    bare = text.strip(" .?!。\n")
    found = _WHOLE.fullmatch(bare)
    if found is None or re.search(r"\bor\b", bare):
        return frozenset()
    letters = re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", bare) if not re.fullmatch(r"[A-Ha-h]{2,8}", bare) else list(bare)
    named = [letter.upper() for letter in letters] or re.findall("[A-H]", bare)
    if choices and not set(named) <= set(choices):
        return frozenset()
    return frozenset(named) if len(set(named)) == len(named) else frozenset()


def _decided(text: str, allowed: set[str]) -> frozenset[str]:
    """Letters by evidence in running text."""
    denied = {letter for match in _DENIED.finditer(text) for group in match.groups() if group for letter in _in(group)}
    kept = _DENIED.sub(" ", text)
    votes: list[frozenset[str]] = []
    first = _START.match(text)
    if first and first.group(1) not in denied:
        votes.append(frozenset({first.group(1)}))
    for match in _CORRECT.finditer(kept):
        votes.append(_in(match.group(1) or match.group(2)))
    for match in _MARK.finditer(kept):
        if _STRONG.search(match.group()):
            votes.append(_in(match.group(1)))
    lower = re.search(r"\b(?:answer|option|choice)\b(?:\s?(?:is|:))*\s*[(\[]?([a-h])[)\].]?(?=\s|$)(?!\s[a-z])", kept, re.IGNORECASE)
    if lower and not votes:
        votes.append(frozenset({lower.group(1).upper()}))
    last = _LAST.search(kept)
    if last:
        votes.append(_in(last.group(1)))
    votes = [vote & allowed for vote in votes if vote & allowed]
    if votes:
        distinct = set(votes)
        back = _TAKEN_BACK.search(kept)
        if back and (_in(kept[back.end() :]) & allowed) - votes[0]:
            return frozenset()
        if len(distinct) == 1 and not (_HEDGE.search(kept) and first is None) and not _HEDGE.search(kept.split("\n")[0]):
            return votes[0]
        return frozenset()
    if _ABSTAINS.search(text) or _HEDGE.search(text):
        return frozenset()
    rest = {letter for letter in _in(kept) if letter in allowed} - denied
    return frozenset(rest) if len(rest) == 1 else frozenset()


def _in(text: str) -> frozenset[str]:
    return frozenset(re.findall(_LETTER, text))


def _tokens(words: str) -> list[str]:
    text = re.sub(r"^\W*(?:an?|the)\s+(?=\w)", "", plain(str(words)).lower())
    return re.findall(r"[a-z0-9]+(?:[.,][0-9]+)*|[\u4e00-\u9fff]", text)


def _same_words(words: str, text: str) -> bool:
    mine = _tokens(words)
    if not mine:
        return str(words).strip().lower() == text.strip().lower()
    return mine == _tokens(text)


def _by_words(text: str, choices: Mapping[str, str]) -> frozenset[str]:
    """The only choice whose words the text holds, a longer choice before one that it contains."""
    if _ABSTAINS.search(text) or len(text) > 600:
        return frozenset()
    said = re.findall(r"[a-z0-9]+(?:[.,][0-9]+)*|[\u4e00-\u9fff]", text.lower())
    held: dict[str, tuple[int, int]] = {}
    for letter, words in choices.items():
        mine = _tokens(words)
        places = [place for place in range(len(said)) if mine and said[place : place + len(mine)] == mine]
        if places:
            held[letter] = (places[0], places[0] + len(mine))
    begins = [letter for letter, (start, _) in held.items() if start == 0 and re.match(r"\W*\w+\s*[,.!]", text)]
    if len(begins) == 1 and len(_tokens(choices[begins[0]])) == 1:
        return frozenset(begins)
    outer = [
        letter
        for letter, (start, end) in held.items()
        if not any(other != letter and a <= start and end <= b and (a, b) != (start, end) for other, (a, b) in held.items())
    ]
    if len(outer) != 1:
        return frozenset()
    start, _ = held[outer[0]]
    return frozenset() if {"not", "no", "never", "isn", "t", "or"} & set(said[max(0, start - 3) : start]) else frozenset(outer)
