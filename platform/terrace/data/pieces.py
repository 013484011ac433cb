"""How a sample reads: the pieces that a family writes for a conversation or running text, before any of them is a token.

Images and videos are counted over the whole sample; what a turn looks like, the family says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.interface import Family, Piece

RUNNING_TEXT = "text"  # the role of a caption, a document or plain text


def sample_pieces(sample: Sample, supervise: str, family: Family) -> Iterator[Piece]:
    """What the model reads of a sample, and which pieces are targets. Raises InputError, naming the sample, for what no family writes."""
    messages, images = sample.messages, itertools.count()
    yield from (("mark", role, False) for role in family.beginning)
    if messages[0]["role"] == RUNNING_TEXT:
        if len(messages) != 1:
            raise InputError(f"sample {sample.id}: running text is one message, found {len(messages)} messages")
        supervised = supervise != "assistant"
        yield from family.running(_content(sample, messages[0]["content"], supervised, family, images))
        yield "mark", family.end_of_text, supervised
        return
    try:
        messages = list(family.plain_turns(messages))
    except ValueError as error:
        raise InputError(f"sample {sample.id}: {error}") from error
    yield from family.opening(messages)
    for message in messages:
        supervised = message.get("train", message["role"] == "assistant" or supervise == "all_text")
        yield from _turn(sample, message["role"], message["content"], supervised, family, images)


def _turn(
    sample: Sample, role: str, content: list[dict[str, Any]], supervised: bool, family: Family, images: Iterator[int]
) -> Iterator[Piece]:
    if role == RUNNING_TEXT:
        raise InputError(f"sample {sample.id}: a message of role `text` cannot stand in a conversation")
    try:
        yield from family.turn(role, _content(sample, content, supervised, family, images), supervised)
    except ValueError as error:
        raise InputError(f"sample {sample.id}: {error}") from error


def _content(
    sample: Sample, content: list[dict[str, Any]], supervised: bool, family: Family, images: Iterator[int]
) -> Iterator[Piece]:
    """`images` counts those of the whole sample."""
    for item in content:
        kind = item.get("type")
        if kind == "text":
            yield "text", item["text"], supervised
        elif kind in ("image", "video") and not family.reads_pictures:
            yield "cut", None, False  # the texts before and behind it stay two
        elif kind == "image":
            yield from family.heading(next(images))
            yield "image", {"frames": [item["image"]], "timestamps": None}, False
            yield from family.ending()
        elif kind == "video":
            if not item["frames"] or len(item["frames"]) != len(item["timestamps"]):
                raise InputError(f"sample {sample.id}: a video needs frames, and one timestamp for each")
            if not family.videos:
                raise InputError(f"sample {sample.id}: {family.name} reads no videos here; give single frames as images")
            yield from (("mark", role, False) for role in family.before)
            yield "video", {"frames": list(item["frames"]), "timestamps": list(item["timestamps"])}, False
            yield from (("mark", role, False) for role in family.after)
        elif kind == "token":
            yield "token", item["token"], supervised
        elif kind in ("box", "point"):
            values, wanted = item[kind], 4 if kind == "box" else 2
            if len(values) != wanted:
                raise InputError(f"sample {sample.id}: a {kind} has {wanted} numbers, found {len(values)}")
            yield "coordinates", {"image": item["image"], "values": values}, supervised
        else:
            raise InputError(f"sample {sample.id}: unknown content item type {kind!r}")


def prompt_pieces(sample: Sample, family: Family) -> Iterator[Piece]:
    """The pieces up to the last answer, ending in the header of one; of running text, up to and including its last image."""
    if sample.messages[0]["role"] == RUNNING_TEXT:
        pieces = list(sample_pieces(sample, "auto", family))
        last = max((place for place, piece in enumerate(pieces) if piece[0] in ("image", "video")), default=-1)
        if last >= 0:  # the image, and what is written behind it before anything is learned
            rest = itertools.takewhile(lambda piece: not piece[2], pieces[last + 1 :])
            yield from (*pieces[: last + 1], *rest)
        return
    messages = sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages
    yield from sample_pieces(Sample(sample.id, sample.kind, messages, sample.metadata), "auto", family)
    yield from family.generation()
