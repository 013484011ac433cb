"""A reward that another service computes: `{name: remote, options: {url: ..., task: ..., token_env: ...}}`.

A slow or dead service is tried again with growing pauses; when the attempts are used up the stage stops with an error.
It never becomes a 0: a service that is down says nothing about the responses.
"""

from __future__ import annotations

import base64
import os
import random
import time
from collections.abc import Sequence

from terrace.errors import InputError, TerraceError
from terrace.rewards.types import RewardItem, without_images

PAUSE_CAP_SECONDS = 30.0


class RewardServiceError(TerraceError):
    """A remote reward did not answer within its attempts."""


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
    Retried: no connection, time-outs, status 429 and 5xx. Not retried: other statuses, which are input errors (wrong
    token, unknown task). The token is read from the environment variable `token_env`.
    """
    import httpx

    token = os.environ.get(token_env, "")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    values: list[float | None] = []
    with httpx.Client(timeout=timeout_seconds, headers=headers, transport=transport) as client:  # type: ignore[arg-type]
        for start in range(0, len(items), items_per_request):
            part = items[start : start + items_per_request]
            plain = [_with_images_as_text(item) if send_images else without_images(item) for item in part]
            body = {"items": [{"task": task, **item._asdict()} for item in plain]}
            values += _post(client, url.rstrip("/") + "/score", body, len(part), attempts, pause_seconds)
    return values


def _with_images_as_text(item: RewardItem) -> RewardItem:
    images = [base64.b64encode(data).decode() for data in item.metadata.get("images", ())]
    return item._replace(metadata={**item.metadata, "images": images}) if images else item


def _post(client, url: str, body: dict, count: int, attempts: int, pause_seconds: float) -> list[float | None]:
    import httpx

    reason = ""
    for attempt in range(attempts):
        if attempt:
            pause = min(pause_seconds * 2 ** (attempt - 1), PAUSE_CAP_SECONDS)
            time.sleep(pause * random.uniform(0.5, 1.0))
        try:
            response = client.post(url, json=body)
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if response.status_code == 429 or response.status_code >= 500:
            reason = f"status {response.status_code}: {response.text[:200]}"
            continue
        if response.status_code != 200:
            raise InputError(f"remote reward {url}: status {response.status_code}: {response.text[:200]}")
        scores = response.json()["scores"]
        if len(scores) != count:
            raise RewardServiceError(f"remote reward {url} answered {len(scores)} scores for {count} items")
        return [score["value"] for score in scores]
    raise RewardServiceError(f"remote reward {url} did not answer in {attempts} attempts ({reason}); is it running?")
