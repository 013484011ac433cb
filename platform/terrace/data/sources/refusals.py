"""Why a sample does not take part: a word to count by, a sentence to read, and where the sample came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass

REASONS = {
    "bad_row": "the row is not a JSON object, or a field has the wrong type",
    "unknown_convention": "no known convention fits the row's keys",
    "placeholder_mismatch": "the text has another number of placeholders than the row has images, boxes or points",
    "missing_image": "an image that the row names is not there, or the kind needs an image and the row has none",
    "remote_image": "the row names an image on the web; fetch it first, Terrace reads files and shards only",
    "unsafe_path": "an image path leaves the folder of images",
    "not_an_image": "the file is not an image of a known format",
    "truncated_image": "the image cannot be decoded to its end",
    "image_too_large": "more pixels than data.max_image_pixels allows",
    "image_aspect_ratio": "more than 200 times as long as wide",
    "bad_coordinates": "a box or point is malformed or lies outside its image",
    "empty_text": "there is no text to learn from",
    "empty_answer": "an assistant turn is empty, or there is none",
    "duplicate_id": "an earlier sample of this source is the same, by its id, text and images",
    "unknown_field": "a key or member that nobody reads; rename it, or leave it out with `ignore`",
    "unwanted_answer": "the answer is marked as one that is not wanted, or no answer is to be trained",
    "split_sample": "the members of one sample lie apart in the shard",
    "not_a_sample": "a file that describes the data, such as a licence or a README",
    "too_large": "larger than one row or member may be",
    "unsupported": "the convention is known but this content is not supported",
    "unreadable_shard": "the shard cannot be read from here on",
}


class Refusal(Exception):
    """Raised while one sample is being read; ingest and index count it and go on with the next sample."""

    def __init__(self, reason: str, detail: str):
        if reason not in REASONS:
            raise ValueError(f"unknown refusal reason {reason!r}")
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return Refusal, (self.reason, self.detail)


@dataclass(frozen=True)
class RefusedSample:
    """One line of refused.jsonl."""

    origin: str  # file and line, or shard and key
    id: str
    reason: str
    detail: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)
