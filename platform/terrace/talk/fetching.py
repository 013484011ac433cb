"""Pictures from addresses, for a server that was told which hosts it may ask.

A server that fetches what it is told to can be made to ask for what only its own network may see, so nothing is fetched
unless the host was named on the command line; redirects are not followed, and the size and the time are bounded.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

import httpx

from terrace.talk.request import BadRequest

SECONDS = 20.0


def fetch_picture(url: str, hosts: Collection[str], most_bytes: int) -> bytes:
    """The bytes at an address. Raises BadRequest for a host that is not allowed, and for what cannot be fetched."""
    parts = urlsplit(url)
    if (parts.hostname or "") not in hosts:
        raise BadRequest(
            "this server fetches no pictures from there: send a data URI (data:image/jpeg;base64,...), or start it with"
            f" --allow-images-from {parts.hostname or 'HOST'}"
        )
    if parts.username or parts.password:
        raise BadRequest("an address with a user name is not fetched")
    data = bytearray()
    try:
        with httpx.stream("GET", url, timeout=SECONDS, follow_redirects=False) as response:
            if response.status_code != 200:
                raise BadRequest(f"{parts.hostname} answered with status {response.status_code}")
            for piece in response.iter_bytes():
                data += piece
                if len(data) > most_bytes:
                    raise BadRequest(f"the picture has more than {most_bytes:,} bytes")
    except httpx.HTTPError as error:
        raise BadRequest(f"the picture cannot be fetched: {error}") from error
    return bytes(data)
