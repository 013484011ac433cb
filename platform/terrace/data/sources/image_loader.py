"""The pictures that rows name: read inside the folder that they may name, checked, decoded once with training's own decoder."""

from __future__ import annotations

import os
from typing import Any, Protocol

from terrace.data.image_files import ImageDamage, check_file, orientation, without_orientation
from terrace.data.images import decode_image
from terrace.data.sources.formats import Unit
from terrace.data.sources.media import ImageReference
from terrace.data.sources.refusals import Refusal
from terrace.recipe.schema import Storage
from terrace.storage.files import absolute, file_size, is_remote, join, read_file

CHECKED_IMAGES = 8_192  # remembered results of image checks per worker
MAX_IMAGE_BYTES = 512 * 2**20


class LoaderSettings(Protocol):
    """What the loader needs of a unit's settings."""

    images_root: str | None
    max_image_pixels: int
    exif: str
    storage: Storage


class ImageLoader:
    """Reads and checks the images that rows name, inside the folder that they may name."""

    def __init__(self, settings: LoaderSettings, unit: Unit):
        self._settings = settings
        root = settings.images_root or unit.files[0].rpartition("/")[0]
        if not settings.images_root and (unit.format == "image_folder" or unit.mapping):
            root = unit.root
        self._root = absolute(root)
        self._checked: dict[str, tuple[int, int] | Refusal] = {}
        self.rotated = 0  # pictures of the rows that EXIF says to turn, turned or not

    def load(self, reference: ImageReference) -> tuple[bytes, tuple[int, int]]:
        """(bytes, (width, height)) of a healthy image; of one that `exif: ignore` leaves lying, with its tag taken out. Raises Refusal."""
        content, known = self._load(reference)
        if orientation(content) != 1:
            self.rotated += 1
            if self._settings.exif == "ignore":
                content = without_orientation(content)
                known = self._check(content, reference.label)
        return content, known

    def _load(self, reference: ImageReference) -> tuple[bytes, tuple[int, int]]:
        if reference.data is not None:
            return reference.data, self._check(reference.data, reference.label)
        assert reference.path is not None
        uri = self._inside(reference.path)
        known = self._checked.get(uri)
        if isinstance(known, Refusal):
            raise known
        try:
            if not is_remote(uri) and (file_size(uri) or 0) > MAX_IMAGE_BYTES:
                raise self._remember(uri, Refusal("too_large", f"{reference.path} has more than {MAX_IMAGE_BYTES:,} bytes"))
            content = read_file(uri, self._settings.storage)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
            raise self._remember(uri, Refusal("missing_image", f"there is no file {reference.path} in {self._root}")) from None
        except OSError as error:  # name too long, no permission
            raise self._remember(uri, Refusal("missing_image", f"{reference.path}: {error.strerror}")) from error
        if known is None:
            try:
                known = self._check(content, reference.path)
            except Refusal as refusal:
                raise self._remember(uri, refusal) from None
            self._remember(uri, known)
        return content, known

    def _check(self, content: bytes, label: str) -> tuple[int, int]:
        try:
            check_file(content)
            height, width, _ = decode_image(content, self._settings.max_image_pixels).shape
        except ImageDamage as damage:
            raise Refusal(damage.reason, f"{label}: {damage.detail}") from damage
        return width, height

    def _remember(self, uri: str, result: Any) -> Any:
        if len(self._checked) >= CHECKED_IMAGES:
            self._checked.pop(next(iter(self._checked)))
        self._checked[uri] = result
        return result

    def _inside(self, path: str) -> str:
        """The URI of a row's image path, which must stay in the folder of images: rows may come from strangers."""
        parts = path.replace("\\", "/").split("/")
        if ".." in parts:
            raise Refusal("unsafe_path", f"{path!r} holds `..`; paths are relative to {self._root}")
        if is_remote(path):
            if not path.startswith(self._root.rstrip("/") + "/"):
                raise Refusal("unsafe_path", f"{path!r} lies outside {self._root}; set images_root to allow it")
            return path
        if path.startswith("/"):
            if is_remote(self._root) or not os.path.abspath(path).startswith(self._root.rstrip("/") + "/"):
                raise Refusal("unsafe_path", f"{path!r} lies outside {self._root}; set images_root to allow it")
            return os.path.abspath(path)
        if "\0" in path:
            raise Refusal("unsafe_path", "the path holds a zero byte")
        return join(self._root, path)


