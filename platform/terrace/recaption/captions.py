"""One part of a shard: the pictures in it, the captions that they could have, and which of those are kept.

Every usable sample gives one caption for each of `texts`, every other sample one refusal: kept and refused ones together are all there
are. What a part becomes depends on its samples, the settings and the models alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isal.isal_zlib import crc32

from terrace.data.image_files import ImageDamage, check_file, orientation, without_orientation
from terrace.data.images import decode_image
from terrace.data.sources.conventions import RUNNING_TEXT, Rules
from terrace.data.sources.media import ImageReference
from terrace.data.sources.refusals import Refusal, RefusedSample
from terrace.data.sources.shard_walk import Group
from terrace.data.sources.shard_writing import sample_json
from terrace.data.sources.shards import sample_of_members
from terrace.data.types import Sample
from terrace.evaluate.cases import Case
from terrace.evaluate.replies import Reply
from terrace.recipe.schema_inputs import Source
from terrace.recipe.schema_recaption import Recaption

REASONS = {  # beside those of ingest
    "not_one_picture": "a caption is about one picture, and the sample has none or several",
    "cut_off": "the caption reached max_new_tokens before it ended",
    "empty_caption": "the model wrote nothing",
    "repeated": "the same picture has this caption already",
    "low_score": "the filter says less than the threshold",
}
Write = Callable[[Sequence[Case]], list[Reply]]
Judge = Callable[[Sequence[Case], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Models:
    """What writes and what judges; None: nothing is written, or all is kept."""

    write: Write | None
    judge: Judge | None


@dataclass(frozen=True)
class Pictured:
    """A sample that one picture is shown in. `place`: its number in the shard."""

    origin: str
    place: int
    sample: Sample
    image: bytes
    size: tuple[int, int]  # width, height


@dataclass(frozen=True)
class Caption:
    about: Pictured
    whose: str  # own, written
    text: str
    sample: Sample


@dataclass(frozen=True)
class Kept:
    """What a part becomes: samples with their picture, how many of them have which text, and the rest."""

    samples: list[tuple[Sample, bytes]]
    counts: dict[str, int]
    refused: list[RefusedSample]


def pictured(group: Group, stem: str, shard: str, place: int, source: Source, rules: Rules, most_pixels: int) -> Pictured:
    """The sample of a group, its picture decoded once. Raises Refusal, or `NotOne` where it has no picture or several."""
    if group.refusal is not None:
        raise group.refusal
    sample, suffixes = sample_of_members(group.key, group.data, f"{stem}-{group.key}", source.kind, rules)
    if len(suffixes) != 1:
        raise NotOne(sample.id, len(suffixes))
    content = group.data[suffixes[0]]
    try:
        check_file(content)
        if source.exif == "ignore" and orientation(content) != 1:
            content = without_orientation(content)
        height, width, _ = decode_image(content, most_pixels).shape
    except ImageDamage as damage:
        raise Refusal(damage.reason, f"{group.key}.{suffixes[0]}: {damage.detail}") from damage
    return Pictured(f"{shard}:{group.key}", place, sample, content, (width, height))


class NotOne(Exception):
    """A sample with another number of pictures than one."""

    def __init__(self, sample_id: str, pictures: int) -> None:
        super().__init__(f"{sample_id} has {pictures} pictures")


def keep_fitting(pictures: Sequence[Pictured], wanted: Recaption, models: Models) -> Kept:
    """Write, judge and part the captions of these pictures."""
    cases = [question(one, wanted.prompt) for one in pictures]
    captions, refused = [], []
    replies = models.write(cases) if models.write is not None else [None] * len(cases)
    heard: set[tuple[int, str]] = set()
    for one, reply in zip(pictures, replies, strict=True):
        offered = [own_caption(one)] if "own" in wanted.texts else []
        if reply is not None:
            if why := unusable(reply):
                refused.append(refusal(one, *why))
            else:
                offered.append(written_caption(one, reply))
        for caption in offered:
            mark = (crc32(one.image), caption.text)
            if mark in heard:
                refused.append(refusal(one, "repeated", caption.text))
            else:
                captions.append(caption)
            heard.add(mark)
    by_place = {one.place: case for one, case in zip(pictures, cases)}
    scores = models.judge([by_place[one.about.place] for one in captions], [one.text for one in captions]) if models.judge else None
    kept, counts = [], dict.fromkeys(wanted.texts, 0)
    for number, caption in enumerate(captions):
        score = scores[number] if scores is not None else None
        if score is not None and not score >= float(wanted.threshold or 0.0):  # no number is below any threshold
            refused.append(refusal(caption.about, "low_score", f"{score:.4f} for the {caption.whose} caption {caption.text!r}"))
            continue
        sample = with_provenance(caption, score, wanted)
        try:
            sample_json(sample, [])
        except Refusal as error:  # what no shard can hold
            refused.append(refusal(caption.about, error.reason, error.detail))
            continue
        kept.append((sample, caption.about.image))
        counts[caption.whose] += 1
    return Kept(kept, counts, refused)


def question(one: Pictured, prompt: str) -> Case:
    """The picture as the captioner is asked about it."""
    content: list[dict[str, Any]] = [{"type": "image", "image": 0}]
    if prompt:
        content.append({"type": "text", "text": prompt})
    asked = Sample(one.sample.id, "prompt", [{"role": "user", "content": content}])
    return Case(one.sample.id, asked, (ImageReference(data=one.image),), (one.size,), None, rotation=one.place)


def unusable(reply: Reply) -> tuple[str, str] | None:
    """Why an answer is no caption."""
    if not reply.text.strip():
        return "empty_caption", f"{reply.tokens} tokens without a letter"
    if not reply.finished:
        return "cut_off", f"{reply.tokens} tokens: {reply.text}"
    return None


def own_caption(one: Pictured) -> Caption:
    """The running text of the sample, or the answers in it."""
    said = (RUNNING_TEXT, "assistant")
    items = [item for message in one.sample.messages if message["role"] in said for item in message["content"]]
    return Caption(one, "own", "".join(item["text"] for item in items if item["type"] == "text").strip(), one.sample)


def written_caption(one: Pictured, reply: Reply) -> Caption:
    """In one line."""
    text = " ".join(reply.text.split())
    messages = [{"role": RUNNING_TEXT, "content": [{"type": "image", "image": 0}, {"type": "text", "text": text}]}]
    return Caption(one, "written", text, Sample(f"{one.sample.id}-written", "caption", messages, dict(one.sample.metadata)))


def with_provenance(caption: Caption, score: float | None, wanted: Recaption) -> Sample:
    """The caption's sample; `recaption` in its metadata says where it comes from."""
    told: dict[str, Any] = {"source": wanted.source, "id": caption.about.sample.id, "origin": caption.about.origin, "text": caption.whose}
    if caption.whose == "written":
        told |= {"captioner": wanted.captioner, "own": own_caption(caption.about).text}
    if score is not None:
        told |= {"filter": wanted.filter, "score": round(score, 6)}
    return replace(caption.sample, kind="caption", metadata={**caption.sample.metadata, "recaption": told})


def refusal(one: Pictured, reason: str, detail: str) -> RefusedSample:
    return RefusedSample(one.origin, one.sample.id, reason, detail[:500])
