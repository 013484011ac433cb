"""How right an answer is, and how sure a score is. Pure functions over text and numbers; no model, no file.

Numbers, boxes and points are read from an answer by the same rules that reward them in an RL stage, so "right" means one
thing everywhere. Every score has an interval of 95 %: Wilson's where each case is right or wrong (it stays inside [0, 1]
and is honest for 20 cases), a seeded bootstrap of 1,000 draws everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from terrace.rewards.rules.answers import final_answer
from terrace.rewards.rules.chart import TOLERANCE, relaxed
from terrace.rewards.rules.coordinates import answer_groups
from terrace.rewards.rules.counting import counting
from terrace.rewards.rules.grounding import grounding
from terrace.rewards.rules.gui_point import gui_point
from terrace.rewards.rules.text_distance import distance_share, edit_distance, plain_words
from terrace.rewards.types import RewardItem

RIGHT_IOU = 0.5  # RefCOCO's threshold
BOOTSTRAP_DRAWS = 1_000
NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """A figure with its interval of 95 % and the number of cases behind it."""

    value: float
    low: float
    high: float
    count: int
    interval: str  # wilson or bootstrap


# ---------------------------------------------------------------- intervals


def wilson(right: Sequence[float] | np.ndarray) -> Score:
    """Share of ones in `right` (0 or 1 each) with Wilson's score interval. Of no case: 0 in [0, 1]."""
    count = len(right)
    if not count:
        return Score(0.0, 0.0, 1.0, 0, "wilson")
    share = float(np.mean(right))
    square = NORMAL_95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL_95 * np.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    low, high = float(max(0.0, centre - half)), float(min(1.0, centre + half))
    return Score(share, min(low, share), max(high, share), count, "wilson")


def bootstrap(parts: np.ndarray, figure: Callable[[np.ndarray], float]) -> Score:
    """`figure` of the column sums of `parts` float [N, K], with the 2.5th and 97.5th percentile over resampled rows.

    The draws are seeded, so the same cases in the same order give the same interval on any machine.
    """
    count = len(parts)
    if not count:
        return Score(0.0, 0.0, 0.0, 0, "bootstrap")
    random = np.random.Generator(np.random.PCG64(0))
    values = []
    for _ in range(BOOTSTRAP_DRAWS):
        weights = np.bincount(random.integers(0, count, count), minlength=count)
        values.append(figure(weights @ parts))
    low, high = np.percentile(values, [2.5, 97.5])
    return Score(float(figure(parts.sum(axis=0))), float(low), float(high), count, "bootstrap")


@dataclass(frozen=True)
class Statistic:
    """What a figure is made of: a row of numbers per question, and the figure of their column sums.

    The same parts give a score with its interval and, from two models, the interval of their difference.
    """

    parts: np.ndarray  # float64 [N, K]
    figure: Callable[[np.ndarray], float]
    right_or_wrong: bool = False  # parts are (0 or 1, 1)

    @property
    def score(self) -> Score:
        return wilson(self.parts[:, 0]) if self.right_or_wrong else bootstrap(self.parts, self.figure)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Statistic:
    """Sum over sum, for example loss over tokens."""
    parts = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
    return Statistic(parts, lambda sums: sums[0] / sums[1] if sums[1] else 0.0)


def mean(values: Sequence[float]) -> Statistic:
    """Mean over questions."""
    return ratio(values, np.ones(len(values)))


def share(values: Sequence[float]) -> Statistic:
    """Share of right ones; each value is 0 or 1."""
    counted = mean(values)
    return Statistic(counted.parts, counted.figure, right_or_wrong=True)


def paired_interval(first: Statistic, second: Statistic) -> tuple[float, float]:
    """Interval of 95 % of `second` minus `first`, both over the same N questions in the same order."""
    columns = first.parts.shape[1]
    both = np.concatenate([first.parts, second.parts], axis=1)
    change = bootstrap(both, lambda sums: second.figure(sums[columns:]) - first.figure(sums[:columns]))
    return change.low, change.high


# ---------------------------------------------------------------- one answer


def box_iou(answer: str, expected: Any, metadata: dict[str, Any]) -> float:
    """IoU of the answer's one box with `expected["bbox"]` (pixels of the stored image); 0 without exactly one box.

    Raises ValueError if the expected box has no area.
    """
    [value] = grounding([RewardItem("", answer, expected, metadata)], metric="iou")
    if value is None:
        raise ValueError(f"the expected box {expected} has no area")
    return value


def point_in_box(answer: str, expected: Any, metadata: dict[str, Any]) -> float:
    """1 if the answer's one point lies in `expected["bbox"]` (borders included); a box or several points are 0."""
    [value] = gui_point([RewardItem("", answer, expected, metadata)])
    return float(value or 0.0)


def accepted(expected: Any) -> list[str]:
    """The accepted answers of a case: one text, or a list of them."""
    return [str(text) for text in expected] if isinstance(expected, list | tuple) else [str(expected)]


def exact_count(answer: str, expected: str | Sequence[str]) -> float:
    """1 if the answer's one number (digits or words) is an accepted count. Raises ValueError if one is no number."""
    values = counting([RewardItem("", answer, text) for text in accepted(expected)])
    if None in values:
        raise ValueError(f"the expected count {expected!r} is no number")
    return max(values)


def numbers_read(answer: str) -> str:
    """The boxes, points or number lists that were read from an answer, for people."""
    return " ".join(f"[{', '.join(f'{value:g}' for value in group)}]" for group in answer_groups(answer))


def answer_read(answer: str) -> str:
    """The final answer that was read, or nothing."""
    found = final_answer(answer)
    return found.text if found else ""


def relaxed_match(answer: str, expected: str | Sequence[str], tolerance: float = TOLERANCE) -> float:
    """ChartQA's relaxed accuracy: a number within `tolerance` of an accepted one (0 only by 0), other text by equal words.

    As published, with its quirk: a year is a number, so 2008 is right where 2010 is expected."""
    found = final_answer(answer)
    return max(relaxed(found.text, text, tolerance) for text in accepted(expected)) if found is not None else 0.0


def exact_text(answer: str, expected: str | Sequence[str]) -> float:
    """1 for the same characters as an accepted text, runs of white space counting as one space."""
    return max(float(plain_words(answer) == plain_words(text)) for text in accepted(expected))


def edit_distance_share(answer: str, expected: str | Sequence[str]) -> float:
    """Edits to the nearest accepted text as a share of the longer of the two: 0 the same, 1 nothing in common."""
    return min(distance_share(answer, text) for text in accepted(expected))


def anls(answer: str, expected: str | Sequence[str]) -> float:
    """A case's part of ANLS (Biten et al. 2019, DocVQA): 1 minus the normalised edit distance to the nearest accepted text, 0
    below one half.

    As the published script computes it, with its quirks: case and runs of white space do not count, and a similarity of exactly
    one half counts (the paper's formula gives 0 there)."""
    said = plain_words(answer).lower()
    texts = [plain_words(text).lower() for text in accepted(expected)]
    similarity = max(1.0 - edit_distance(said, text) / max(len(said), len(text), 1) for text in texts)
    return similarity if similarity >= 0.5 else 0.0


# ---------------------------------------------------------------- captions


def caption_values(answer: str, references: str | Sequence[str]) -> dict[str, float]:
    """sacrebleu's figures of one caption against one or several: chrF in [0, 100], and the counts that BLEU is made of."""
    from sacrebleu.metrics import BLEU, CHRF

    plain = [plain_words(text) for text in accepted(references)]
    bleu = BLEU(tokenize=_tokenizer_for(plain[0])).sentence_score(plain_words(answer), plain)
    counts = {f"bleu_right_{n + 1}": float(value) for n, value in enumerate(bleu.counts)}
    totals = {f"bleu_total_{n + 1}": float(value) for n, value in enumerate(bleu.totals)}
    lengths = {"bleu_answer_length": float(bleu.sys_len), "bleu_reference_length": float(bleu.ref_len)}
    return {"chrf": CHRF().sentence_score(plain_words(answer), plain).score, **counts, **totals, **lengths}


def corpus_bleu(values: Sequence[dict[str, float]]) -> Statistic:
    """BLEU in [0, 100] of all captions together."""
    from sacrebleu.metrics import BLEU

    names = [f"bleu_{part}_{n}" for part in ("right", "total") for n in range(1, 5)]
    names += ["bleu_answer_length", "bleu_reference_length"]
    parts = np.array([[value[name] for name in names] for value in values], np.float64).reshape(len(values), len(names))

    def figure(sums: np.ndarray) -> float:
        whole = [int(value) for value in sums]
        return float(BLEU.compute_bleu(whole[:4], whole[4:8], sys_len=whole[8], ref_len=whole[9]).score)

    return Statistic(parts, figure)


def _tokenizer_for(reference: str) -> str:
    """Chinese has no spaces between words: sacrebleu's `zh` cuts it by character."""
    return "zh" if any("一" <= letter <= "鿿" for letter in reference) else "13a"
