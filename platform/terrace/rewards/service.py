"""The rewards of a stage as an HTTP service: the same router behind Ray Serve.

`POST /score` `{"items": [{"task", "prompt", "response", "solution", "metadata"}]}` -> `{"scores": [{"value", "parts",
"failure", "reasons"}]}` (`metadata.images`, if sent, are base64 files); `GET /health`; `GET /metrics` (Prometheus text). `/score`
and `/metrics` want `Authorization: Bearer TOKEN`. Requests that arrive within a few milliseconds are judged together. A
failed reward is `"value": null` with its reason.

A replica that has `max_waiting_items` responses to judge answers 429 with `Retry-After` instead of taking more, so that a service
that is too slow is seen in its metrics and in the stage's reward seconds, and never in its memory. `/health` is 503 while the
sandbox cannot judge; Ray Serve then replaces the replica.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from terrace.errors import InputError, TerraceError
from terrace.recipe.schema_grpo import RewardRule
from terrace.rewards.router import Router
from terrace.rewards.sandbox import SandboxError, SandboxPool
from terrace.rewards.types import RewardItem, Score

MAX_REQUEST_BYTES = 256 * 2**20
MAX_WAITING_ITEMS = 4096
MAX_QUEUED_REQUESTS = 256  # in front of all replicas; Ray Serve answers 503 to more, which clients try again
HEALTHY_SECONDS = 10.0  # for which a probe of the sandbox holds
PROBE = RewardItem("", "1", "1")


class RewardService:
    """Answers the three routes. `token=None` switches authentication off (loopback use only)."""

    def __init__(
        self,
        rewards: Mapping[str, Sequence[dict]],
        token: str | None,
        sandbox_workers: int = 2,
        item_seconds: float = 5.0,
        max_waiting_items: int = MAX_WAITING_ITEMS,
    ) -> None:
        self._most, self._waiting, self._refused, self._probed = max_waiting_items, 0, 0, 0.0
        self._pool = SandboxPool(sandbox_workers, item_seconds)
        rules = {task: [RewardRule.model_validate(rule) for rule in named] for task, named in rewards.items()}
        self._router = Router(rules, self._pool)
        self._token = token
        self._requests = 0
        self._seconds = 0.0

    async def score_requests(self, requests: list[list[tuple[str, RewardItem]]]) -> list[list[Score]]:
        """Judge several requests' pairs in one go; the answers are cut apart again."""
        pairs = [pair for request in requests for pair in request]
        scores = iter(await asyncio.to_thread(self._router.score, pairs))
        return [[next(scores) for _ in request] for request in requests]

    async def score_request(self, pairs: list[tuple[str, RewardItem]]) -> list[Score]:
        return (await self.score_requests([pairs]))[0]

    async def __call__(self, request: Any) -> Any:
        """One Starlette request to its response."""
        from starlette.responses import JSONResponse, PlainTextResponse

        path = request.url.path.rstrip("/")
        if path.endswith("/health"):
            try:
                await asyncio.to_thread(self.check_health)
            except TerraceError as error:
                return JSONResponse({"status": "failing", "error": str(error)}, status_code=503)
            return JSONResponse({"status": "ok", "tasks": list(self._router.tasks), "waiting_items": self._waiting})
        if self._token is not None:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                return JSONResponse({"error": "missing or wrong token"}, status_code=401)
        if path.endswith("/metrics"):
            return PlainTextResponse(self._metrics())
        if not (path.endswith("/score") and request.method == "POST"):
            return JSONResponse({"error": "use POST /score, GET /health or GET /metrics"}, status_code=404)
        body = await request.body()
        if len(body) > MAX_REQUEST_BYTES:
            return JSONResponse({"error": f"more than {MAX_REQUEST_BYTES} bytes"}, status_code=413)
        try:
            pairs = [_pair(fields) for fields in json.loads(body)["items"]]
            unknown = sorted({task for task, _ in pairs} - set(self._router.tasks))
            if unknown:
                raise InputError(
                    f"no reward for task {', '.join(unknown)}; this service has {', '.join(self._router.tasks)}"
                )
        except (ValueError, KeyError, TypeError, AttributeError, InputError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=422)
        if self._waiting and self._waiting + len(pairs) > self._most:  # one large request alone is taken
            self._refused += 1
            busy = f"{self._waiting} responses wait to be judged, at most {self._most} may; try again, or serve more replicas"
            return JSONResponse({"error": busy}, status_code=429, headers={"Retry-After": "1"})
        started = time.monotonic()
        self._waiting += len(pairs)
        try:
            scores = await self.score_request(pairs)
        except (
            TerraceError
        ) as error:  # a sandbox that cannot start, a remote reward that is down: the caller tries again
            return JSONResponse({"error": str(error)}, status_code=503)
        finally:
            self._waiting -= len(pairs)
        self._requests += 1
        self._seconds += time.monotonic() - started
        answers = [{"value": score.value, "parts": score.parts, "failure": score.failure, "reasons": score.reasons} for score in scores]
        return JSONResponse({"scores": answers})

    def check_health(self) -> None:
        """Raises TerraceError while the sandbox cannot judge. Ray Serve asks it too, and replaces a replica that fails."""
        if time.monotonic() - self._probed > HEALTHY_SECONDS:
            (outcome,) = self._pool.judge("counting", [PROBE])
            if outcome.value != 1.0:
                raise SandboxError(f"the sandbox judges nothing: {outcome.failure}")
            self._probed = time.monotonic()

    def _metrics(self) -> str:
        lines = [
            "# TYPE terrace_reward_requests_total counter",
            f"terrace_reward_requests_total {self._requests}",
            "# TYPE terrace_reward_seconds_total counter",
            f"terrace_reward_seconds_total {self._seconds:.6f}",
            "# TYPE terrace_reward_waiting_items gauge",
            f"terrace_reward_waiting_items {self._waiting}",
            "# TYPE terrace_reward_refused_total counter",
            f"terrace_reward_refused_total {self._refused}",
            "# TYPE terrace_reward_responses_total counter",
        ]
        for task, count in self._router.counts.items():
            label = json.dumps(task)
            lines.append(f'terrace_reward_responses_total{{task={label},result="scored"}} {count.scored}')
            lines.append(f'terrace_reward_responses_total{{task={label},result="failed"}} {count.failed}')
        return "\n".join(lines) + "\n"


def _pair(fields: dict) -> tuple[str, RewardItem]:
    task, response = fields["task"], fields["response"]
    if not isinstance(task, str) or not isinstance(response, str):
        raise TypeError("task and response are strings")
    metadata = dict(fields.get("metadata") or {})
    if "images" in metadata:
        metadata["images"] = [base64.b64decode(image, validate=True) for image in metadata["images"]]
    return task, RewardItem(fields.get("prompt", ""), response, fields["solution"], metadata)


def serve_application(
    rewards: Mapping[str, Sequence[RewardRule]],
    token: str | None,
    replicas: int = 1,
    sandbox_workers: int = 2,
    item_seconds: float = 5.0,
    batch_wait_seconds: float = 0.005,
    gpus_per_replica: float = 0.0,
    max_waiting_items: int = MAX_WAITING_ITEMS,
) -> Any:
    """The Ray Serve application (deploy it with `serve.run`)."""
    from ray import serve

    @serve.deployment(
        name="rewards", num_replicas=replicas, max_ongoing_requests=64, max_queued_requests=MAX_QUEUED_REQUESTS,
        ray_actor_options={"num_gpus": gpus_per_replica} if gpus_per_replica else {},
    )  # fmt: skip
    class DeployedRewardService(RewardService):
        @serve.batch(max_batch_size=64, batch_wait_timeout_s=batch_wait_seconds)
        async def score_request(self, pairs: list[list[tuple[str, RewardItem]]]) -> list[list[Score]]:  # type: ignore[override]
            return await self.score_requests(pairs)

        async def __call__(self, request: Any) -> Any:
            return await RewardService.__call__(self, request)

    plain = {task: [rule.model_dump() for rule in rules] for task, rules in rewards.items()}
    return DeployedRewardService.bind(plain, token, sandbox_workers, item_seconds, max_waiting_items)
