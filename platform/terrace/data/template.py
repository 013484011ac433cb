"""Sample to tokens: conversations as the family writes them, running text, images, coordinates, and what is supervised.

The one place that turns a sample into token ids; what a turn looks like and how many tokens an image takes, the family
says. `measure_sample` says how many tokens a sample has at *any* resolution from two facts: an image's placeholders are
arithmetic on its size, and a coordinate is one token per digit. The index stores that `Measure`, so a plan over
billions of samples is arithmetic and a pack's length is known before an image is opened.

Text between two marks is encoded as one string, as Hugging Face tools do, so the ids equal the reference; where a family
cuts it (before an answer, in ChatML), the two sides are encoded apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from terrace.data.pieces import RUNNING_TEXT, prompt_pieces, sample_pieces
from terrace.data.tokenizer import TextTokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.interface import Bounds, Family, Piece, View, Visual

Size = tuple[int, int]  # (width, height) of an original image


@dataclass(frozen=True)
class Encoded:
    """One sample as the model reads it at one resolution. I counts its images and videos, in token order."""

    input_ids: np.ndarray  # int32 [L]
    supervised: np.ndarray  # bool [L]: this token is a target
    positions: np.ndarray  # int32 [P, L]
    visuals: tuple[Visual, ...]  # I of them
    views: tuple[View, ...]  # I: of a video, the view of its frames
    images: tuple[tuple[int, ...], ...]  # I: the sample's image numbers: one for an image, the frames of a video

    @property
    def facts(self) -> np.ndarray:
        """int32 [I, k], without columns where there is no image."""
        return np.asarray([visual.facts for visual in self.visuals], np.int32)


@dataclass(frozen=True)
class Measure:
    """What the index stores of a sample: its token length at any resolution is arithmetic on this and the image sizes.

    length = fixed_tokens + sum over visuals of their tokens + sum over coordinates of their digits.
    """

    fixed_tokens: int  # tokens that no resolution changes: text and marks
    supervised_tokens: int  # of them, targets
    # Of each visual: (image number, frames: 0 for an image, tokens before its placeholders, coordinates among them). Those tokens are
    # text and marks, a coordinate counted as one; visuals before it and longer coordinates come on top.
    visuals: tuple[tuple[int, int, int, int], ...]
    coordinates: tuple[tuple[int, int, float], ...]  # (image number, axis: 0 is x and 1 is y, pixels of the original)
    cuts: tuple[int, ...]  # running text: fixed tokens before each place where the text may be split well (line ends)
    first_target: tuple[int, int, int] = (-1, 0, 0)  # tokens before the first target as for a visual, visuals and coordinates; -1: none

    def length(self, sizes: Sequence[Size], pixels: Bounds, family: Family) -> int:
        """Tokens of the sample when its images are resized within `pixels` = (min, max)."""
        family = family.among(len(sizes))
        views = [family.view(width, height, pixels) for width, height in sizes]
        tokens = self.fixed_tokens
        for image, frames, _, _ in self.visuals:
            tokens += int(family.frame_pairs(frames)) * views[image].length
        if self.coordinates:
            numbers = [family.coordinate(value, axis, sizes[image], views[image]) for image, axis, value in self.coordinates]
            tokens += int(family.coordinate_tokens(np.asarray(numbers, np.int64)).sum())
        return tokens


def encode_sample(
    sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, family: Family, pixels: Bounds, supervise: str = "auto"
) -> Encoded:
    """Encode a sample whose images measure `sizes`, resized within `pixels` = (min, max).

    `supervise`: `auto` (running text on its text, conversations on assistant turns), `all_text`, or `assistant`.
    Raises InputError, naming the sample, when text and images disagree.
    """
    return _encode(sample, sizes, tokenizer, family, pixels, sample_pieces(sample, supervise, family))


def encode_prompt(sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, family: Family, pixels: Bounds) -> Encoded:
    """The sample up to the assistant's last turn, ending in the header of an answer, ready to generate.

    Running text becomes its own beginning: everything up to and including the last image.
    """
    return _encode(sample, sizes, tokenizer, family, pixels, prompt_pieces(sample, family))


def encode_observation(sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, family: Family, pixels: Bounds) -> Encoded:
    """What stands between the end mark of the conversation's last answer and the next one: the turns behind it, and the header of an
    answer. Positions count from 0; `sizes` are those of all images of the sample. Raises InputError where a later image would change
    how an earlier one is seen.
    """
    pieces = [*sample_pieces(sample, "assistant", family), *family.generation()]
    ends = [place for place, (kind, value, answer) in enumerate(pieces) if kind == "mark" and value == family.end_of_turn and answer]
    if not ends or sample.messages[-1]["role"] == "assistant":
        raise InputError(f"sample {sample.id}: an observation stands behind an answer")
    shown = sum(item["type"] == "image" for message in sample.messages[:-1] for item in message["content"])
    if shown < len(sizes) and family.crosses:
        raise InputError(f"{family.name} reads pictures beside its text, behind whose prompt none can be added here; observe in text alone")
    if shown < len(sizes) and family.images_both_ways:
        raise InputError(f"{family.name} lets the tokens of an image see each other both ways, behind an answer too; observe in text alone")
    if shown and shown < len(sizes) and family.among(shown) != family.among(len(sizes)):
        raise InputError(f"{family.name} sees every image of a conversation otherwise when one more comes; observe in text alone")
    return _encode(sample, sizes, tokenizer, family, pixels, iter(pieces[ends[-1] + 1 :]))


def encode_answer(text: str, tokenizer: TextTokenizer, family: Family) -> list[int]:
    """Token ids of an answer behind `encode_prompt`, with its end mark."""
    header = "".join(value for kind, value, _ in family.generation() if kind == "text") if family.answer_prefix else ""
    prefixed = family.answer_prefix + text
    ids = tokenizer.encode_behind(header, prefixed) if header else tokenizer.encode(prefixed)
    return [*ids, tokenizer.marks(family)[family.end_of_turn]]


def written_texts(sample: Sample, family: Family) -> Iterator[str]:
    """What the model reads of a sample between two marks or numbers: its own text and the words the family writes around turns.

    A tokenizer is trained on it: without the turns' own words `You are a helpful assistant.` was 20 tokens of every short sample.
    Raises InputError, naming the sample, for one that the family cannot write."""
    yield from (value for kind, value, _ in sample_pieces(sample, "auto", family) if kind == "text")
    if sample.messages[-1]["role"] == "user" and family.gives == "text":  # a prompt: the header of the answer to come
        yield from (value for kind, value, _ in family.generation() if kind == "text")


def measure_sample(sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, family: Family) -> Measure:
    """The resolution-independent size of a sample. InputError, naming the sample, when it cannot be trained on."""
    measure, text_to_learn = _measure(sample, sizes, tokenizer, family, sample_pieces(sample, "auto", family))
    if not text_to_learn and sample.kind not in ("prompt", "picture"):
        raise InputError(f"sample {sample.id}: it has no text to learn from (empty answer or empty caption)")
    return measure


def measure_prompt(sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, family: Family) -> Measure:
    """The size of `encode_prompt`'s tokens, for a sample without an answer."""
    measure, _ = _measure(sample, sizes, tokenizer, family, prompt_pieces(sample, family))
    return replace(measure, supervised_tokens=0)


def _measure(
    sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, family: Family, pieces: Iterator[Piece]
) -> tuple[Measure, bool]:
    """The measure of the pieces, and whether any text among them is a target."""
    _check_references(sample, len(sizes))
    running_text = sample.messages[0]["role"] == RUNNING_TEXT
    tokenizer.marks(family)
    ids = supervised_tokens = 0
    text_to_learn = False
    visuals: list[tuple[int, int, int, int]] = []
    first_target, coordinates_before = (-1, 0, 0), 0
    coordinates: list[tuple[int, int, float]] = []
    cuts: list[int] = []

    def shortest(image: int, axis: int, value: float) -> str:
        coordinates.append((image, axis, float(value)))
        return family.coordinate_text(0)

    for kind, value, flags in _joined(pieces, tokenizer, family, shortest):
        before = coordinates_before  # `_joined` has rendered those of this piece already
        coordinates_before = len(coordinates)
        if first_target[0] < 0 and kind in ("mark", "token") and flags[0][2]:
            first_target = (ids, len(visuals), before)
        if kind == "text":
            breaks = running_text and "\n" in value
            # Where no target and no line ends inside the text, its tokens are only counted: their places take as long as they do.
            if breaks or len(flags) > 1:
                tokens, offsets = tokenizer.encode_with_offsets(value)
                length = len(tokens)
            else:
                length, offsets = tokenizer.count(value), []
            learnt = [value[start:stop] for start, stop, flag in flags if flag]
            if learnt and first_target[0] < 0:
                within = int(_token_flags(flags, offsets).argmax()) if len(flags) > 1 else 0
                first_target = (ids + within, len(visuals), before)
            if breaks:
                cuts += [ids + place + 1 for place, (_, end) in enumerate(offsets[:-1]) if value[end - 1] == "\n"]
            ids += length
            if len(flags) > 1:
                supervised_tokens += int(_token_flags(flags, offsets).sum())
            elif learnt:
                supervised_tokens += length
            text_to_learn = text_to_learn or any(map(str.strip, learnt))
        elif kind in ("mark", "token"):
            ids += 1
            supervised_tokens += 1 if flags[0][2] else 0
        else:
            frames = 0 if kind == "image" else len(value["frames"])
            visuals.append((value["frames"][0], frames, ids, len(coordinates)))
            cuts.append(ids + len(family.after))  # behind the marks that follow
    if coordinates and not tokenizer.splits_digits:
        raise InputError(
            f"sample {sample.id}: it has boxes or points, and this tokenizer merges digits, so its length"
            " would depend on them; use a tokenizer that writes one token per digit"
        )
    good_cuts = tuple(cut for cut in cuts if cut < ids) if running_text and not coordinates else ()
    fixed = ids - len(coordinates)
    return Measure(fixed, supervised_tokens, tuple(visuals), tuple(coordinates), good_cuts, first_target), text_to_learn


# Characters [start, stop) of a joined text that are, or are not, targets; one such run for a mark or an image.
Flags = list[tuple[int, int, bool]]


def _joined(
    pieces: Iterator[Piece], tokenizer: TextTokenizer, family: Family, render: Callable[[int, int, float], str]
) -> Iterator[tuple[str, Any, Flags]]:
    """Join the text between two marks or cuts, with coordinates rendered by `render(image, axis, value)`, and a `token` that this
    tokenizer does not have, or that is a mark of the family's own, as its letters."""
    text, flags = "", Flags()
    for kind, value, supervised in pieces:
        if kind == "coordinates":
            numbers = [render(value["image"], axis % 2, number) for axis, number in enumerate(value["values"])]
            kind, value = "text", f"[{', '.join(numbers)}]"
        elif kind == "token" and (value in family.marks.values() or tokenizer.token_id(value) is None):
            kind = "text"
        if kind == "text":
            if flags and flags[-1][2] == supervised:
                flags[-1] = (flags[-1][0], len(text) + len(value), supervised)
            elif value:
                flags.append((len(text), len(text) + len(value), supervised))
            text += value
            continue
        if text:
            yield "text", text, flags
        text, flags = "", []
        if kind != "cut":
            yield kind, value, [(0, 1, supervised)]
    if text:
        yield "text", text, flags


def _token_flags(flags: Flags, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [T]: which tokens of a joined text are targets, each by the character that it begins with."""
    starts = np.asarray([start for start, _, _ in flags])
    runs = np.searchsorted(starts, [start for start, _ in offsets], side="right") - 1
    return np.asarray([flag for _, _, flag in flags])[runs]


def _encode(
    sample: Sample, sizes: Sequence[Size], tokenizer: TextTokenizer, family: Family, pixels: Bounds, pieces: Iterator[Piece]
) -> Encoded:
    _check_references(sample, len(sizes))
    marks = tokenizer.marks(family)
    family = family.among(len(sizes))
    all_views = [family.view(width, height, pixels) for width, height in sizes]

    def at_this_resolution(image: int, axis: int, value: float) -> str:
        return family.coordinate_text(family.coordinate(value, axis, sizes[image], all_views[image]))

    ids: list[int] = []
    supervised: list[np.ndarray] = []
    visuals: list[Visual] = []
    views: list[View] = []
    images: list[tuple[int, ...]] = []
    asked: list[int] | None = None
    if family.reads_questions:
        pieces, question = itertools.tee(pieces)
        asked = tokenizer.encode_question(_question(family.question(list(question)), tokenizer, family, at_this_resolution))
    for kind, value, flags in _joined(pieces, tokenizer, family, at_this_resolution):
        if kind == "text" and len(flags) > 1:
            tokens, offsets = tokenizer.encode_with_offsets(value)
            ids += tokens
            supervised.append(_token_flags(flags, offsets))
            continue
        before = len(ids)
        if kind == "text":
            ids += tokenizer.encode(value)
        elif kind == "mark":
            ids.append(marks[value])
        elif kind == "token":
            ids.append(tokenizer.token_id(value))
        else:
            visual, view = _visual(len(ids), value, all_views, family)
            if asked is not None:
                visual = replace(visual, facts=family.asked(visual.facts, asked))
            ids += [marks[kind]] * visual.tokens if visual.seconds is not None else _image_tokens(view, family, tokenizer)
            visuals.append(visual)
            views.append(view)
            images.append(tuple(value["frames"]))
        supervised.append(np.full(len(ids) - before, flags[0][2]))
    if not ids:
        raise InputError(f"sample {sample.id}: there is nothing to read in it")
    return Encoded(
        input_ids=np.asarray(ids, dtype=np.int32),
        supervised=np.concatenate(supervised),
        positions=family.positions(len(ids), visuals),
        visuals=tuple(visuals),
        views=tuple(views),
        images=tuple(images),
    )


def _question(asked: Sequence[Piece], tokenizer: TextTokenizer, family: Family, render: Callable[[int, int, float], str]) -> str:
    """The text of a question; empty for running text, which asks nothing."""
    return "".join(value for kind, value, _ in _joined(iter(asked), tokenizer, family, render) if kind == "text")


def _visual(start: int, value: dict[str, Any], views: Sequence[View], family: Family) -> tuple[Visual, View]:
    """The placeholders of an image, or of a video at the resolution of its first frame."""
    frames, stamps = value["frames"], value["timestamps"]
    view = views[frames[0]]
    if stamps is None:
        return Visual(start, view.tokens, view.facts, None, view.inner), view
    pairs = int(family.frame_pairs(len(frames)))
    seconds = tuple(float(second) - float(stamps[0]) for second in stamps[:: -(-len(stamps) // pairs)])
    return Visual(start, pairs * view.tokens, family.video_facts(view, len(frames)), seconds), view


def _image_tokens(view: View, family: Family, tokenizer: TextTokenizer) -> list[int]:
    """The tokens of one image: its placeholders and what the family writes among them."""
    marks, ids = tokenizer.marks(family), list[int]()
    for kind, value in family.written(view):
        if kind == "inside":
            ids += tokenizer.encode(family.inside[value])
        else:
            ids += [marks["image"]] * value if kind == "image" else [marks[value]]
    if len(ids) != view.length:
        raise InputError(f"{family.name} counts {view.length} tokens for an image and writes {len(ids)}")
    return ids


def _check_references(sample: Sample, image_count: int) -> None:
    """Every item's image exists and every image is shown exactly where the text says; otherwise InputError."""
    if not sample.messages:
        raise InputError(f"sample {sample.id}: it has no messages")
    shown: list[int] = []
    for message in sample.messages:
        for item in message["content"]:
            referred = item["frames"] if item.get("type") == "video" else [item["image"]] if "image" in item else []
            for image in referred:
                if not 0 <= image < image_count:
                    raise InputError(f"sample {sample.id}: it refers to image {image} and has {image_count} images")
            if item.get("type") in ("image", "video"):
                shown += referred
    if sorted(set(shown)) != list(range(image_count)):
        raise InputError(f"sample {sample.id}: it has {image_count} images, its text shows {sorted(set(shown))}")
