"""A reward that another service computes: `{name: remote, options: {url: ..., task: ..., token_env: ...}}`.

A slow or dead service is tried again with growing pauses; when the attempts are used up the stage stops with an error that names
the URL. It never becomes a 0: a service that is down says nothing about the responses. One request has a deadline as a whole
(a service that sends a byte a second is slow, whatever each byte takes) and a limit on the size of its answer.
"""

from __future__ import annotations

import base64
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from terrace.errors import InputError, TerraceError
from terrace.rewards.types import RewardItem, without_images

PAUSE_CAP_SECONDS = 30.0
BYTES_PER_ITEM = 4096  # of an answer, at most, and as much again for all of it


class RewardServiceError(TerraceError):
    """A remote reward did not answer within its attempts, or answered something else than scores."""


class _TryAgain(Exception):
    """This attempt failed in a way that may pass."""


def remote(
    items: Sequence[RewardItem],
    *,
    url: str,
    task: str,
    token_env: str = "TERRACE_REWARD_TOKEN",
    timeout_seconds: float = 60.0,
    attempts: int = 6,
    pause_seconds: float = 0.5,
    items_per_request: int = 256,
    send_images: bool = False,
    transport: object = None,
) -> list[float | None]:
    """Scores from `URL/score`, in order; None where the service itself reports a failed reward.

    `send_images` adds the prompt's image files (base64) to every item, for a service that runs a multimodal judge.
    `timeout_seconds` is for one request as a whole. Retried: no connection, time-outs, status 429 and 5xx. Not retried: other
    statuses, which are input errors (wrong token, unknown task), and answers of another shape. The token is read from the
    environment variable `token_env`.
    """
    import httpx

    if not url.startswith(("http://", "https://")):
        raise InputError(f"remote reward {url!r}: write the URL with http:// or https:// before it")
    token = os.environ.get(token_env, "").strip()
    if any(character.isspace() or not character.isprintable() for character in token):
        raise InputError(f"remote reward {url}: the token in {token_env} holds white space or control characters; mend the variable")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    values: list[float | None] = []
    clients = partial(httpx.Client, timeout=timeout_seconds, headers=headers, transport=transport)
    for start in range(0, len(items), items_per_request):
        part = items[start : start + items_per_request]
        plain = [_with_images_as_text(item) if send_images else without_images(item) for item in part]
        body = {"items": [{"task": task, **item._asdict()} for item in plain]}
        answer = _post(clients, url.rstrip("/") + "/score", body, len(part), timeout_seconds, attempts, pause_seconds)
        values += _values(answer, url.rstrip("/") + "/score", len(part), start)
    return values


def _with_images_as_text(item: RewardItem) -> RewardItem:
    images = [base64.b64encode(data).decode() for data in item.metadata.get("images", ())]
    return item._replace(metadata={**item.metadata, "images": images}) if images else item


def _post(
    clients: Callable[[], Any], url: str, body: dict, count: int, timeout_seconds: float, attempts: int, pause_seconds: float
) -> bytes:
    reason = ""
    for attempt in range(attempts):
        if attempt:
            pause = min(pause_seconds * 2 ** (attempt - 1), PAUSE_CAP_SECONDS)
            time.sleep(pause * random.uniform(0.5, 1.0))
        try:
            with clients() as client:
                return _within(timeout_seconds, partial(_answer, client, url, body, BYTES_PER_ITEM * (count + 1)))
        except _TryAgain as error:
            reason = str(error)
    raise RewardServiceError(f"remote reward {url} did not answer in {attempts} attempts ({reason}); is it running?")


def _within(seconds: float, call: Callable[[], bytes]) -> bytes:
    """What `call` returns or raises, or _TryAgain after `seconds`. It then runs on in its thread until its next read fails."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True, name="remote-reward")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise _TryAgain(f"the answer was not complete after {seconds:g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _answer(client: Any, url: str, body: dict, most_bytes: int) -> bytes:
    """The body of one answer of status 200. Raises _TryAgain, InputError, or RewardServiceError for one that is too large."""
    import httpx

    received = bytearray()
    try:
        with client.stream("POST", url, json=body) as response:
            for chunk in response.iter_bytes():
                received += chunk
                if len(received) > most_bytes:
                    raise RewardServiceError(f"remote reward {url} answers more than {most_bytes} bytes; is this a reward service?")
            status = response.status_code
    except httpx.InvalidURL as error:
        raise InputError(f"remote reward {url}: this is no URL ({error})") from error
    except (httpx.TransportError, httpx.DecodingError, httpx.StreamError) as error:
        raise _TryAgain(f"{type(error).__name__}: {error}") from error
    if status == 429 or status >= 500:
        raise _TryAgain(f"status {status}: {_said(received)}")
    if status != 200:
        raise InputError(f"remote reward {url}: status {status}: {_said(received)}")
    return bytes(received)


def _values(answer: bytes, url: str, count: int, start: int) -> list[float | None]:
    """The values of an answer `{"scores": [{"value": number or null}]}`. Raises RewardServiceError for every other shape."""
    try:
        scores = json.loads(answer)["scores"]
        if not isinstance(scores, list):
            raise TypeError("scores is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise RewardServiceError(
            f'remote reward {url} answers something else than {{"scores": [{{"value": ...}}]}}: {_said(answer) or "nothing"}'
        ) from error
    if len(scores) != count:
        raise RewardServiceError(f"remote reward {url} answered {len(scores)} scores for {count} items")
    values: list[float | None] = []
    for place, score in enumerate(scores):
        value = score.get("value", "missing") if isinstance(score, dict) else score
        if value is not None and (not isinstance(score, dict) or isinstance(value, bool) or not isinstance(value, int | float)):
            raise RewardServiceError(
                f'remote reward {url}: the score of item {start + place} is {json.dumps(score)[:100]}, not {{"value": number or null}}'
            )
        values.append(value)
    return values


def _said(answer: bytes | bytearray) -> str:
    return bytes(answer[:200]).decode(errors="replace").strip()
