"""Answers in words: "isosceles", "Yes", 红色, "does not exist", "Tom and Jerry", C3H8, "May 5".

Right is the word alone, or the word in a short sentence that neither denies it nor names another beside it.
"""

from __future__ import annotations

import re

from terrace.rewards.rules.latex import inside, plain

_YES_NO = ({"yes", "no"}, {"true", "false"}, {"correct", "incorrect"}, {"是", "否"}, {"对", "错"}, {"正确", "错误"})
_SAME = {"dne": "does not exist", "undefined": "does not exist", "t": "true", "f": "false"}
_HEDGE = re.compile(r"\bor\b|或|\beither\b|\bmaybe\b|\bperhaps\b", re.IGNORECASE)
_FILLER = {"a", "an", "the"}
_SENTENCE = {  # one of these makes words a sentence
    "is", "are", "was", "were", "be", "it", "it's", "its", "this", "that", "there", "shows", "show", "see", "has", "have", "answer",
    "looks", "appears", "called", "named", "of", "in", "on", "at", "because", "since", "so", "they", "he", "she", "i", "would", "as", "by",
    "to", "must",
}  # fmt: skip


def is_words(gold: str) -> bool:
    """Whether a solution is words: at least a run of two letters, no LaTeX command, no mathematical sign."""
    text = re.sub(r"_\{?(\w+)\}?", r"\1", inside(plain(gold)))
    if re.fullmatch(r"(?:[A-Z][a-z]?\d*)+", text) and re.search(r"\d", text):
        return True  # a chemical formula
    if not re.search(r"[A-Za-z]{2}|[\u4e00-\u9fff]", text) or re.search(r"[\\^=<>|{}+*]|_", text):
        return False
    if re.fullmatch(r"[\u4e00-\u9fff]{1,40}", text):
        return True
    words = re.findall(r"[A-Za-z][A-Za-z'’-]*", text)
    if not words:
        return True
    if re.search(r"\d\s?[A-Za-z]\b|\([^)]*[-/]", text) and max(map(len, words)) < 4:
        return False
    return max(map(len, words)) >= 3 or text.lower() in ("no", "up", "in", "on") or (len(words) == 1 and text.isupper())


def same_words(gold: str, text: str) -> bool:
    """Whether the answer's text says the solution's words."""
    gold, text = inside(plain(gold)), plain(text).strip()
    target, words = _words(gold), _words(inside(text))
    if not target:
        return False
    if (
        words == target
        or _meaning(words) == _meaning(target)
        or "".join(words) == "".join(target)
        or _joined(gold) == _joined(inside(text))
    ):
        return True
    if _months(target) and sorted(words) == sorted(target):
        return True
    parts, said = _parts(gold), _parts(inside(text))
    if len(parts) > 1:
        return sorted(parts) == sorted(said)
    if "\u4e00" <= gold[0] <= "\u9fff":
        return _chinese(gold, text)
    if len(words) > 20 or _HEDGE.search(text):
        return False
    for pair in _YES_NO:
        if target[0] in pair and len(target) == 1:
            others = pair - set(target)
            if words[:1] == target and len(words) > 1 and re.match(r"\W*\w+\s*[,.;:—-]", text):
                return words[1:2] != list(others) and not re.search(r"\band\b", " ".join(words[:3]))
            return target[0] in words and not others & set(words) and "not" not in words and "t" not in words
    if {"not", "isn", "never", "neither", "cannot"} & set(words) and not {"not", "cannot"} & set(target):
        return False
    denied = re.search(r"\b(?:is|are|was|were)\s(?:wrong|incorrect|false|not)\b", text, re.IGNORECASE)
    if denied and not {"wrong", "incorrect"} & set(target):
        return False
    if gold.isupper() and len(target) == 1:  # an acronym such as SSS: no other may stand beside it
        return set(re.findall(r"\b[A-Z]{2,}\b", text)) == {gold}
    phrase = re.match(r"(?:the|an?)\s", text, re.IGNORECASE) and words[-len(target) :] == target  # "the planet Saturn"
    if len(words) > len(target) and not phrase and not _SENTENCE & set(words):
        return False  # "cat dog" is two guesses
    places = [place for place in range(len(words)) if words[place : place + len(target)] == target]
    if len(places) != 1:
        return False
    after = text[text.lower().find(target[-1]) + len(target[-1]) :]
    return not re.match(r"\s?(?:[,;/]|and\b|&)", after) and not re.search(r"[;/]|, [^,]*,|\band\s+\w+\s*[.!]?$", text)


def _words(text: str) -> list[str]:
    text = re.sub(r"(\d)(?:st|nd|rd|th)\b", r"\1", text.lower())
    found = re.findall(r"[a-zà-ÿ0-9'’-]+(?:\.\d+)?|[\u4e00-\u9fff]+", re.sub(r"[_{}]", "", text))
    found = [word.strip("'’-") for word in found if word.strip("'’-")]
    while len(found) > 1 and found[0] in _FILLER:
        found = found[1:]
    return found


def _meaning(words: list[str]) -> str:
    said = " ".join(words)
    return _SAME.get(said, said)


def _joined(text: str) -> str:
    return re.sub(r"[\s_{}\\.,;:!]", "", text).lower()


def _months(words: list[str]) -> bool:
    names = (
        "january february march april may june july august september october november december jan feb mar apr jun jul aug sep oct nov dec"
    )
    return any(word in names.split() for word in words) and any(word.isdigit() for word in words)


def _parts(text: str) -> list[str]:
    return [" ".join(_words(part)) for part in re.split(r",|;|\band\b|&|、|和|与", text) if _words(part)]


def _chinese(gold: str, text: str) -> bool:
    said = "".join(re.findall(r"[\u4e00-\u9fff]+", text))
    place = said.find(gold)
    if place < 0 or said.count(gold) > 1 or _HEDGE.search(text) or re.search(r"[、和与]", text):
        return False
    before = said[:place]
    for pair in _YES_NO:
        if gold in pair:
            return not before or before[-1] in "是为案：" or before.endswith(("说法", "结论", "命题", "判断", "答案"))
    return not before.endswith(("不", "不是", "非", "没", "没有")) and len(said) <= len(gold) + 12
