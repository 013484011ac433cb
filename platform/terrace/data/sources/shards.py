"""The members of one sample in a tar to a `Sample`: one function, `sample_of_members`, reads them at index time and at training time.

| members | become |
|---|---|
| `json` that Terrace wrote | the sample as it stands there |
| `jpg`, `png`, ... | images: one, or several that are numbered (`0.jpg`, `1.jpg`) or that the `json` names in order |
| `txt`, `caption`, `text` | the text |
| `json` | a row in any form of `conventions.py` |
| `cls`, `index`, `key`, `url` and the like | descriptive, left out |
| any other (masks, videos, arrays) | refuses the sample, unless the source's `ignore` names the suffix |
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from terrace.data.images import IMAGE_EXTENSIONS
from terrace.data.sources.conventions import ImageReference, Rules, convert_row
from terrace.data.sources.encoding import decode_text
from terrace.data.sources.fields import is_empty, is_ignored, plain_name
from terrace.data.sources.media import IMAGE_KEYS, MAYBE_IMAGE_KEYS
from terrace.data.sources.refusals import Refusal
from terrace.data.sources.shard_writing import CANONICAL_VERSION, sample_json
from terrace.data.types import Sample

TEXT_SUFFIXES = ("json", "txt", "caption", "text")
DESCRIPTIVE_SUFFIXES = frozenset("cls cls2 index inx id key url md5 sha1 sha256 hash uid".split())  # noqa: SIM905
MASK_NAMES = frozenset("seg mask masks depth normal normals edge edges canny alpha matte segmentation instance semantic".split())  # noqa: SIM905
_CONVERSATION_KEYS = ("messages", "conversations", "conversation", "content", "texts")


def is_image_suffix(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in IMAGE_EXTENSIONS


def sample_of_members(key: str, data: dict[str, bytes], default_id: str, kind: str, rules: Rules | None = None) -> tuple[Sample, list[str]]:
    """The sample of a group, and the suffixes of its images in the order of its image numbers. Raises Refusal, and nothing else."""
    try:
        return _sample(key, data, default_id, kind, rules or Rules())
    except Refusal:
        raise
    except Exception as error:  # one sample of a stranger's tar ends nothing but itself
        raise Refusal("bad_row", f"the sample {key} cannot be understood ({type(error).__name__}: {error})") from error


def used_suffixes(data: dict[str, bytes], images: list[str], ignore: Collection[str] = ()) -> list[str]:
    """The members that `sample_of_members` reads: texts and the sample's images."""
    return [suffix for suffix in data if suffix in images or (suffix in TEXT_SUFFIXES and is_ignored(suffix, ignore) is None)]


def _sample(key: str, data: dict[str, bytes], default_id: str, kind: str, rules: Rules) -> tuple[Sample, list[str]]:
    if rules.ignore:
        data = _without_ignored(data, rules)
    row: dict[str, Any] = {}
    if "json" in data:
        row = _json_row(data["json"])
        if row.get("terrace") == CANONICAL_VERSION and {"id", "kind", "messages", "images"} <= set(row):
            return _canonical(key, row, data)
    named = _names_images(row)
    suffixes = _images(key, data, named)
    text = _text(data)
    conversation = bool(row) and any(not is_empty(row.get(name)) for name in _CONVERSATION_KEYS)
    if text is not None and not conversation:
        if is_empty(row.get("text")) or not str(row["text"]).strip() or str(row["text"]).strip() == text.strip():
            row = {**row, "text": text}
        else:
            raise Refusal("unknown_field", f"{key}: the text member and the `text` of its json differ; write one of them into `ignore`")
    elif text is not None:
        raise Refusal("unknown_field", f"{key}: nobody reads the text member beside a conversation in the json; write `ignore: [txt]`")
    if not row and kind != "picture":
        raise Refusal("empty_text", f"{key} has no text, only {', '.join(sorted(data)[:8])}")
    if not named:  # the members are the pictures; `url` and its like say where they came from
        row = {**{name: value for name, value in row.items() if plain_name(name) not in MAYBE_IMAGE_KEYS}, "images": suffixes}
    sample, references = convert_row(row, default_id, kind, rules)
    if not (key + default_id).isascii() or b"\\u" in data.get("json", b""):
        sample_json(sample, suffixes)  # what no shard could hold, half a surrogate pair, is refused here as in rows
    return sample, _matched(key, references, suffixes)


def _canonical(key: str, row: dict[str, Any], data: dict[str, bytes]) -> tuple[Sample, list[str]]:
    missing = [suffix for suffix in row["images"] if suffix not in data]
    if missing:
        raise Refusal("missing_image", f"the shard holds no {key}.{missing[0]}")
    return Sample(row["id"], row["kind"], row["messages"], row.get("metadata", {})), row["images"]


def _without_ignored(data: dict[str, bytes], rules: Rules) -> dict[str, bytes]:
    kept = {}
    for suffix, content in data.items():
        entry = is_ignored(suffix, rules.ignore)
        if entry is None:
            kept[suffix] = content
        else:
            rules.ignored[entry] += 1
    return kept


def _images(key: str, data: dict[str, bytes], named: bool) -> list[str]:
    """The suffixes of the sample's images, in order. Raises Refusal for members that nobody reads, and for an order that nobody knows."""
    images, unread = [], []
    for suffix in data:
        infix, _, extension = suffix.rpartition(".")
        if extension in IMAGE_EXTENSIONS and (named or infix.rpartition(".")[2] not in MASK_NAMES):
            images.append(suffix)
        elif suffix not in TEXT_SUFFIXES and suffix not in DESCRIPTIVE_SUFFIXES:
            unread.append(suffix)
    if unread:
        found = ", ".join(f"{key}.{suffix}" for suffix in list(data)[:6])
        told = f"nobody reads the member {key}.{unread[0]} (found {found}); the key of a sample ends at the first dot of its name"
        raise Refusal("unknown_field", f"{told}. Rename it, or write `ignore: [{unread[0]}]` in the source to leave it out")
    if len(images) > 1:
        images.sort(key=_natural)
    if len(images) > 1 and not named:
        infixes = [re.fullmatch(r"(.*?)(\d+)", suffix.rpartition(".")[0]) for suffix in images]
        if any(found is None for found in infixes) or len({found[1] for found in infixes if found}) > 1:
            told = "nothing says their order; number them, or list them in `images` of the json"
            raise Refusal("unsupported", f"{key} has the images {', '.join(images[:4])}, and {told}")
    return images


def _text(data: dict[str, bytes]) -> str | None:
    """The sample's own text; None where the members are empty."""
    texts = [decode_text(data[suffix], f"the {suffix} member") for suffix in TEXT_SUFFIXES[1:] if suffix in data]
    said = [text for text in texts if text.strip()]
    if len({text.strip() for text in said}) > 1:
        raise Refusal("unknown_field", "the txt and the caption member hold different texts; write one of them into `ignore`")
    return said[0] if said else None


def _names_images(row: dict[str, Any]) -> bool:
    """Whether the row of the json names its images itself."""
    if not row:
        return False
    if any(not is_empty(value) for name, value in row.items() if plain_name(name) in IMAGE_KEYS):
        return True
    turns = row.get("messages") or row.get("conversations") or [{"content": row.get("content")}]
    contents = [turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get("image") or part.get("image_url") for part in parts)


def _matched(key: str, references: list[ImageReference], suffixes: list[str]) -> list[str]:
    """Each reference's member: by what follows the first dot of its name, or in order if that says nothing and the numbers agree.

    Never by key, so that reading a sample by its byte ranges alone gives the same answer as the walk through the shard.
    """
    names = [(reference.path or "").rpartition("/")[2] for reference in references]
    found = [name if name in suffixes else name.partition(".")[2].lower() for name in names]
    matched = [suffix for suffix in found if suffix in suffixes]
    if len(matched) == len(references) and set(matched) == set(suffixes):
        return matched
    if len(references) == len(suffixes):
        return suffixes
    raise Refusal("placeholder_mismatch", f"the text names {len(references)} images, the shard holds {len(suffixes)} for {key}")


def _json_row(data: bytes) -> dict[str, Any]:
    try:
        row = json.loads(decode_text(data, "the json member"))
    except (ValueError, RecursionError) as error:
        raise Refusal("bad_row", f"the json member cannot be read ({error})") from error
    if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
        return {"messages" if "role" in row[0] else "conversations": row}
    if not isinstance(row, dict):
        raise Refusal("bad_row", f"the json member is a {type(row).__name__}, not an object or a list of turns")
    return row


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
