"""The pictures and videos that a row names, in the spellings that people use, as references. No file is opened here.

`image`, `images`, `image_path`, `photo`, `jpg` and the like are pictures wherever they stand. `file_name`, `path`, `url` and the like are
pictures only where nothing else is and the kind needs one or the value ends like a picture: beside a picture, or in a corpus of text, they
say where something came from. Two keys that name different pictures refuse the row; a path beside bytes is the name of those bytes.
A video is given by its sampled frames; a video file, and sound of any kind, is refused by name.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from terrace.data.images import IMAGE_EXTENSIONS
from terrace.data.sources.fields import Fields, is_empty
from terrace.data.sources.refusals import Refusal

IMAGE_KEYS = (
    "images", "image", "image_bytes", "img", "imgs", "jpg", "jpeg", "png", "webp", "picture", "pictures", "photo", "photos", "image_path",
    "image_paths", "img_path", "img_paths", "image_file", "image_files", "source_image", "image_base64", "base64_image", "media",
)  # fmt: skip
IMAGE_NAME_KEYS = ("image_name", "image_filename", "image_url", "image_urls", "img_url")  # pictures where nothing else is
FILE_KEYS = ("file_name", "filename", "filepath", "file_path", "file", "path", "url")  # pictures if they end so or the kind needs one
MAYBE_IMAGE_KEYS = IMAGE_NAME_KEYS + FILE_KEYS
VIDEO_KEYS = ("videos", "video", "video_path", "video_paths", "video_file", "video_url", "mp4", "clip")
AUDIO_KEYS = ("audios", "audio", "audio_path", "audio_paths", "audio_file", "audio_url", "speech", "sound", "wav", "mp3", "flac")
KINDS_WITH_PICTURES = frozenset({"caption", "ocr", "grounding", "gui", "chart", "counting", "picture"})
OTHER_MEDIA = frozenset("mp4 avi mov mkv webm m4v wav mp3 flac ogg m4a heic heif raw svg pdf".split())  # noqa: SIM905
LONGEST_VIDEO_SECONDS = 1_000_000
_SHOWN = 80  # characters of a value in a message
_IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class ImageReference:
    """An image that a row names: a path relative to the source's folder of images, or the bytes themselves."""

    path: str | None = None
    data: bytes | None = None

    @property
    def label(self) -> str:
        return self.path if self.path is not None else "image in the row"


@dataclass(frozen=True)
class VideoReference:
    """A video as its sampled frames, with the time of each in seconds."""

    frames: tuple[ImageReference, ...]
    timestamps: tuple[float, ...]


def row_images(fields: Fields, kind: str, named_inside: bool = False, with_gaps: bool = False) -> list[ImageReference]:
    """The pictures of a row's own keys, in order. `named_inside`: its content items name pictures themselves; `with_gaps`: a null entry
    of the list is no picture but the place of a text."""
    images: list[ImageReference] = []
    for name in fields.of(IMAGE_KEYS):
        images = _agreed(images, _references(fields.take(name), name, with_gaps), name)
    for name in fields.of(MAYBE_IMAGE_KEYS):
        value = fields.look(name)
        if images or named_inside:
            fields.drop(name)
        elif name in IMAGE_NAME_KEYS or kind in KINDS_WITH_PICTURES or _ends_like_a_picture(value):
            images = _references(fields.take(name), name)
        elif _ending(value) in OTHER_MEDIA:
            raise Refusal("unsupported", f"`{name}` names {str(value)[:_SHOWN]!r}, which is neither text nor a picture of a known format")
        else:
            fields.drop(name)
    return images


def row_videos(fields: Fields) -> list[VideoReference]:
    """The videos of a row's own keys. Raises Refusal for files, and for sound."""
    for name in fields.of(AUDIO_KEYS):
        raise Refusal("unsupported", f"`{name}` names sound, which no model here hears; leave the row out")
    for name in fields.of(VIDEO_KEYS):
        value = fields.take(name)
        times = {"fps": fields.take("fps", "sample_fps", "video_fps"), "timestamps": fields.take("timestamps")}
        return [read_video(video, times) for video in _videos(value)]
    return []


def read_video(value: Any, times: dict[str, Any] | None = None) -> VideoReference:
    """A list of frames, or {"frames" | "video": [...], "fps" | "timestamps"}. Raises Refusal."""
    given = dict(times or {})
    if isinstance(value, dict):
        given |= {name: entry for name, entry in value.items() if not is_empty(entry)}
        value = next((value[name] for name in ("frames", "video", "images", "path", "url") if not is_empty(value.get(name))), None)
    if not isinstance(value, list) or not value:
        told = f" ({str(value)[:_SHOWN]!r})" if isinstance(value, str) else ""
        raise Refusal("unsupported", f"a video is given as a list of sampled frames; a video file{told} is not decoded: sample its frames")
    stamps = given.get("timestamps")
    rate = next((given[name] for name in ("fps", "sample_fps") if not is_empty(given.get(name))), None)
    if stamps is None and _is_number(rate) and rate > 0:
        stamps = [number / rate for number in range(len(value))]
    if not isinstance(stamps, list) or len(stamps) != len(value) or not all(_is_number(time) and time >= 0 for time in stamps):
        raise Refusal("bad_row", f"a video of {len(value)} frames needs `fps`, or `timestamps` with one time in seconds for each frame")
    if sorted(stamps) != stamps or stamps[-1] > LONGEST_VIDEO_SECONDS:
        raise Refusal("bad_row", f"the times of a video's frames must rise, and end before {LONGEST_VIDEO_SECONDS:,} seconds")
    return VideoReference(tuple(image_reference(frame) for frame in value), tuple(float(time) for time in stamps))


def image_reference(value: Any) -> ImageReference:
    """A path, a `file://` or `data:` URI, base64, bytes, or Hugging Face's `{"bytes", "path"}`. Web addresses are refused."""
    if isinstance(value, dict):
        if not is_empty(value.get("bytes")):
            path = value.get("path")
            return ImageReference(path if isinstance(path, str) else None, _bytes_of(value["bytes"]))
        if value.get("type") == "Buffer" and isinstance(value.get("data"), list):
            return ImageReference(None, _bytes_of(value))
        if value.get("type") == "base64" and isinstance(value.get("data"), str):  # Anthropic's `source`
            return ImageReference(None, _from_base64(value["data"]))
        unread = [name for name in value if name not in ("bytes", "path", "url", "image", "image_url", "type", "width", "height", "detail")]
        if unread:
            raise Refusal("unknown_field", f"nobody reads `{unread[0]}` of an image; it has `path`, `bytes` or `url`")
        value = next((value[name] for name in ("path", "url", "image", "image_url") if not is_empty(value.get(name))), None)
        if isinstance(value, dict):
            return image_reference(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ImageReference(None, bytes(value))
    if value is None or value == "":
        raise Refusal("missing_image", "an image is empty: it names neither a file nor bytes")
    if not isinstance(value, str):
        raise Refusal("bad_row", f"an image is given as {type(value).__name__}, not as a path or bytes")
    if value.startswith("data:"):
        return ImageReference(None, _from_base64(value.partition(",")[2]))
    if len(value) > 64 and _is_base64_of_an_image(value):
        return ImageReference(None, _from_base64(value))
    scheme = value.partition("://")[0] if "://" in value[:12] else ""
    if scheme not in ("", "file", "s3"):
        raise Refusal("remote_image", f"image {value[:_SHOWN]!r} is not a file here (`{scheme}://`); fetch it first")
    return ImageReference(value.removeprefix("file://"))


# ---------------------------------------------------------------- values


def _references(value: Any, name: str, with_gaps: bool = False) -> list[ImageReference]:
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(ValueError):  # a file name may begin with a bracket
            value = json.loads(value)
    values = value if isinstance(value, list) else [value]
    if all(is_empty(entry) for entry in values):
        return []
    if name == "image_bytes" and len(values) > 16 and all(isinstance(entry, int) for entry in values):
        values = [{"bytes": values}]
    if with_gaps:
        values = [entry for entry in values if entry is not None]
    if isinstance(values[0], list):
        raise Refusal("bad_row", f"`{name}` is a list of lists; images are a list of paths or bytes, frames go into `videos`")
    return [image_reference(entry) for entry in values]


def _agreed(images: list[ImageReference], more: list[ImageReference], name: str) -> list[ImageReference]:
    """Pictures of one key beside those of another: the same ones, or the names of bytes."""
    if not images or not more:
        return images or more
    if len(images) != len(more):
        raise Refusal("bad_row", f"`{name}` names {len(more)} images, another key {len(images)}; put one of the keys into `ignore`")
    both = []
    for one, other in zip(images, more):
        if one.data is not None and other.data is not None and one.data != other.data:
            raise Refusal("bad_row", f"`{name}` and another key hold different images; put one of them into `ignore`")
        if one.data is None and other.data is None and _base(one.path) != _base(other.path):
            raise Refusal("bad_row", f"`{name}` names {other.label[:_SHOWN]}, another key {one.label[:_SHOWN]}; put one into `ignore`")
        both.append(other if one.data is None and other.data is not None else one)
    return both


def _videos(value: Any) -> list[Any]:
    """One video, or a list of videos: of frame lists, objects or files; a list of picture names is one video's frames."""
    if not isinstance(value, list):
        return [value]
    if any(isinstance(entry, list) for entry in value) or any(isinstance(entry, dict) and "bytes" not in entry for entry in value):
        return value
    return [value] if all(not isinstance(entry, str) or _ends_like_a_picture(entry) for entry in value) else value


def _bytes_of(value: Any) -> bytes:
    """Bytes as Parquet has them, as base64, as a list of numbers, or as Node writes a Buffer."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return _from_base64(value.partition(",")[2] if value.startswith("data:") else value)
    if isinstance(value, dict):
        value = value.get("data")
    if isinstance(value, list) and all(isinstance(number, int) and 0 <= number < 256 for number in value):
        return bytes(value)
    raise Refusal("bad_row", "an image's `bytes` are neither bytes nor base64")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal("not_an_image", f"an image's text is not base64 ({error})") from error


def _is_base64_of_an_image(text: str) -> bool:
    try:
        head = base64.b64decode(text[:64].strip()[:32], validate=True)
    except (binascii.Error, ValueError):
        return False
    return head.startswith(_IMAGE_HEADS)


def _ends_like_a_picture(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(_ending(entry) in IMAGE_EXTENSIONS for entry in values)


def _ending(value: Any) -> str:
    return value.partition("?")[0].rpartition(".")[2].lower() if isinstance(value, str) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _base(path: str | None) -> str:
    return (path or "").replace("\\", "/").rpartition("/")[2]
