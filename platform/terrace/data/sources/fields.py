"""The keys of a row: each is read, harmless, or named in the source's `ignore`. Any other one refuses the row.

A key that nobody reads is how a caption loses its picture without a word: `{"photo": "a.png", "text": ...}` would train plain text.
So every reader *takes* the keys it understands, and `finish` looks at what is left. Null and empty values say nothing and never
refuse a row: Parquet gives every row every column. Names are compared without case, and `-` and blanks are `_`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from terrace.data.sources.refusals import Refusal

# What describes a sample and changes nothing of what is learnt from it.
DESCRIPTIVE = frozenset(
    """
    id ids sample_id uid uuid guid key index idx row row_id row_idx row_number image_id img_id image_idx image_index hash md5 sha1
    sha256 phash source sources data_source dataset dataset_name datasource origin provenance subset split config version url urls
    page_url source_url original_url homepage download_url thumbnail_url licence license licences licenses rights attribution author
    authors creator artist credit copyright publisher date created created_at updated_at timestamp year width height size image_size
    image_width image_height original_width original_height width_list height_list
    resolution aspect_ratio channels mode format mime mime_type file_size
    num_bytes language lang languages locale score scores similarity clip_score aesthetic aesthetic_score punsafe pwatermark nsfw
    watermark quality rating ratings relevance_min level difficulty category categories topic topics subject domain tags type task
    metadata meta extra_info model generator annotator annotator_id num_tokens token_count num_turns num_images image_count status
    error_message exif parallel_tool_calls ability reward
    """.split()  # noqa: SIM905
)
# Inside a turn or a content item `source` and `url` may be the picture itself, and little else is a description.
_DESCRIPTIVE_INSIDE = {
    "messages": frozenset("id index uuid timestamp created_at date language lang model score rating source_model".split()),  # noqa: SIM905
    "content": frozenset({"id"}),
}
_DESCRIPTIVE_ENDINGS = ("_sha256", "_md5", "_id", "_score", "_scores", "_rating", "_ratings", "_hash", "_licence", "_license", "_language",
                         "_date")  # fmt: skip

# What some reader understands in a row: the nearest of these is named beside an unknown key.
KNOWN = frozenset(
    """
    text caption captions description alt_text image images messages conversations content texts objects videos system tools functions
    instruction input output history query response question answer problem prompt completion chosen rejected rejected_response
    solution tolerance task label role value weight loss train tool_calls reasoning_content name ref bbox point bbox_type fps
    timestamps frames
    """.split()  # noqa: SIM905
)


def plain_name(key: Any) -> str:
    """A key as it is compared: `Image-URL ` is `image_url`."""
    return _plain_name(key if isinstance(key, str) else str(key))


@lru_cache(4_096)  # the rows of a source have the same few keys
def _plain_name(key: str) -> str:
    return re.sub(r"[\s-]+", "_", key.strip().lower())


def is_empty(value: Any) -> bool:
    """Whether a value says nothing."""
    return value is None or (isinstance(value, (str, list, tuple, dict, bytes)) and not value)


def is_ignored(name: str, ignore: Iterable[str], where: str = "") -> str | None:
    """The entry of `ignore` that names this key (alone, or behind where it stands: `messages.name`), or None."""
    full = f"{where}.{name}" if where else name
    for entry in ignore:
        wanted = entry.strip().lower().lstrip(".")
        wanted = wanted if "." in wanted else plain_name(wanted)
        if wanted in (name, full) or ("*" in wanted and (fnmatchcase(name, wanted) or fnmatchcase(full, wanted))):
            return entry
    return None


class Fields:
    """The keys of one JSON object, taken one by one. `where`: the place of a nested one, `messages`."""

    def __init__(self, row: dict[str, Any], ignore: Iterable[str] = (), ignored: Counter[str] | None = None, where: str = ""):
        self.where = where
        self._spelled: dict[str, str] = {}
        self._values: dict[str, Any] = {}
        for key, value in row.items():
            if is_empty(value):
                continue
            name = plain_name(key)
            entry = is_ignored(name, ignore, where) if ignore else None
            if entry is not None:
                if ignored is not None:
                    ignored[entry] += 1
                continue
            if name in self._values and self._values[name] != value:
                raise Refusal("bad_row", f"the keys {self._spelled[name]!r} and {key!r} mean the same and say different things")
            self._values[name], self._spelled[name] = value, str(key)
        self._left = dict.fromkeys(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def names(self) -> list[str]:
        """The keys that say something, as the row spells them."""
        return [self._spelled[name] for name in self._values]

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of these keys that say something: a row has few keys, and the known spellings are many."""
        values = self._values
        return [] if values.keys().isdisjoint(names) else [name for name in names if name in values]

    def look(self, name: str) -> Any:
        """The value, or None; the key stays to be taken."""
        return self._values.get(name)

    def take(self, *names: str) -> Any:
        """The value of the first of these keys that says something, or None. The others stay, and refuse the row if nobody takes them."""
        for name in names:
            if name in self._values:
                self._left.pop(name, None)
                return self._values[name]
        return None

    def drop(self, *names: str) -> None:
        """Keys whose meaning is already known from others."""
        for name in names:
            self._left.pop(name, None)

    def left(self) -> list[str]:
        """Names that nobody has taken."""
        return list(self._left)

    def finish(self) -> None:
        """Refuse the row if a key is left that is neither known nor descriptive."""
        harmless = _DESCRIPTIVE_INSIDE.get(self.where, DESCRIPTIVE)
        for name in self._left:
            if name not in harmless and (not name.endswith(_DESCRIPTIVE_ENDINGS) or name in KNOWN or self.where == "content"):
                raise self.unknown(name)

    def unknown(self, name: str) -> Refusal:
        key = self._spelled[name]
        near = difflib.get_close_matches(name, sorted(KNOWN - {name}), n=1)
        told = f"nobody reads `{key}`" + (f" of `{self.where}`" if self.where else "")
        if name in KNOWN:
            told += " beside " + ", ".join(f"`{self._spelled[other]}`" for other in list(self._values)[:6] if other != name)
        elif near:
            told += f"; the nearest known name is `{near[0]}`"
        entry = f"{self.where}.{name}" if self.where else name
        return Refusal("unknown_field", f"{told}. Rename it, or write `ignore: [{entry}]` in the source to leave it out")
