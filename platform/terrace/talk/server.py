"""A model over HTTP in OpenAI's form: `POST /v1/chat/completions` (pictures, streams), `GET /v1/models`, and a page to try it.

One conversation is answered at a time, the others wait in line, and beyond a bound of them a request is refused at once.
Whoever leaves while an answer comes ends it. Names of hosts are checked, so that no page of another site can reach a server
on this machine through its visitor's browser.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from terrace.errors import InputError
from terrace.talk.fetching import fetch_picture
from terrace.talk.page import page
from terrace.talk.request import BadRequest, Limits, read_request
from terrace.talk.request import Request as Asked
from terrace.talk.talker import Enough, Prompt, Said, Talker, Wishes

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """How a model is served. `key`: what requests must bring; None: nothing (loopback only)."""

    name: str
    key: str | None = None
    hosts: tuple[str, ...] = LOOPBACK  # names under which the server may be asked; ("*",): any
    image_hosts: tuple[str, ...] = ()
    most_waiting: int = 32
    default_tokens: int = 1024
    temperature: float = 0.0  # of requests that name none
    limits: Limits = field(default_factory=Limits)


class Service:
    """The routes, over one talker."""

    def __init__(self, talker: Talker, settings: Settings) -> None:
        self._talker, self._settings, self._waiting = talker, settings, 0
        self._started = int(time.time())

    def application(self) -> Any:
        routes = [
            Route("/", self._page), Route("/health", self._health), Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model), Route("/v1/chat/completions", self._complete, methods=["POST"]),
        ]  # fmt: skip
        handlers = {BadRequest: _refused, 404: _no_route, 405: _no_route, Exception: _failed}
        made = Starlette(routes=routes, exception_handlers=handlers)
        if "*" not in self._settings.hosts:
            made.add_middleware(TrustedHostMiddleware, allowed_hosts=[*self._settings.hosts], www_redirect=False)
        return made

    # ------------------------------------------------------------ small routes

    async def _page(self, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:; connect-src 'self';"
            " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(page(self._settings.name, nonce, self._settings.key is not None), headers={"Content-Security-Policy": policy})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "waiting": self._waiting})

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def _model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._entry())

    def _entry(self) -> dict[str, Any]:
        return {"id": self._settings.name, "object": "model", "created": self._started, "owned_by": "terrace"}

    def _check_model(self, name: str) -> None:
        if name != self._settings.name:
            raise BadRequest(f"there is no model {name}; this server has {self._settings.name}", "model", "model_not_found", 404)

    def _check_key(self, request: Request) -> None:
        if self._settings.key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._settings.key}".encode()):
            raise BadRequest("the key is missing or wrong (Authorization: Bearer KEY)", None, "invalid_api_key", 401)

    # ------------------------------------------------------------ completions

    async def _complete(self, request: Request) -> Response:
        self._check_key(request)
        settings = self._settings
        values = await self._body(request)
        asked = await run_in_threadpool(read_request, values, settings.limits, self._fetch, settings.default_tokens, settings.temperature)
        self._check_model(asked.model)
        if self._waiting >= settings.most_waiting:
            raise BadRequest(f"{self._waiting} requests wait already; try again later", None, "rate_limit_exceeded", 429)
        try:
            prompt = await run_in_threadpool(self._talker.prompt, asked.turns)
        except InputError as error:
            raise BadRequest(str(error), "messages") from error
        try:
            self._talker.room(prompt)
        except InputError as error:
            raise BadRequest(str(error), "messages", "context_length_exceeded") from error
        pieces = self._pieces(prompt, asked.wishes)
        if asked.stream:
            return StreamingResponse(self._events(pieces, asked), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self._whole(request, pieces)

    async def _body(self, request: Request) -> Any:
        most = self._settings.limits.request_bytes
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("the body is JSON (Content-Type: application/json)", status=415)
        data = bytearray()
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                raise BadRequest(f"the request has more than {most:,} bytes", None, "request_too_large", 413)
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is no JSON: {error}") from error

    def _fetch(self, url: str) -> bytes:
        return fetch_picture(url, self._settings.image_hosts, self._settings.limits.image_bytes)

    async def _pieces(self, prompt: Prompt, wishes: Wishes) -> AsyncIterator[tuple[int, str] | Said]:
        """(answer, text) as they come from the thread that generates, and what was said at the end. Closing it ends generation."""
        loop, queue, left = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def hear(answer: int, text: str) -> None:
            if left.is_set():
                raise Enough
            put((answer, text))

        def work() -> None:
            try:
                put(self._talker.answer(prompt, wishes, hear, left.is_set))
            except BaseException as error:
                put(error)

        self._waiting += 1
        thread = threading.Thread(target=work, name="answer", daemon=True)
        try:
            thread.start()
            while True:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if isinstance(item, Said):
                    return
        finally:
            left.set()
            self._waiting -= 1

    async def _whole(self, request: Request, pieces: AsyncIterator[tuple[int, str] | Said]) -> Response:
        async def said() -> Said:
            async for item in pieces:
                if isinstance(item, Said):
                    return item
            raise RuntimeError("the answer has no end")

        answering = asyncio.ensure_future(said())
        leaving = asyncio.ensure_future(_left(request))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not answering.done():
            answering.cancel()
            raise ClientDisconnect
        done = answering.result()
        choices = [
            {
                "index": index, "message": {"role": "assistant", "content": answer.text, "refusal": None}, "logprobs": None,
                "finish_reason": _reason(answer),
            }
            for index, answer in enumerate(done.answers)
        ]  # fmt: skip
        return JSONResponse({**self._head("chat.completion"), "choices": choices, "usage": _usage(done)})

    async def _events(self, pieces: AsyncIterator[tuple[int, str] | Said], asked: Asked) -> AsyncIterator[str]:
        head = self._head("chat.completion.chunk")
        if asked.include_usage:
            head["usage"] = None

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> str:
            return _event({**head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]})

        try:
            for index in range(asked.wishes.answers):
                yield chunk(index, {"role": "assistant", "content": ""})
            async for item in pieces:
                if not isinstance(item, Said):
                    yield chunk(item[0], {"content": item[1]})
                    continue
                for index, answer in enumerate(item.answers):
                    yield chunk(index, {}, _reason(answer))
                if asked.include_usage:
                    yield _event({**head, "choices": [], "usage": _usage(item)})
        except Exception as error:  # the status has been sent: the stream says what went wrong
            yield _event(BadRequest(f"{type(error).__name__}: {error}", status=500).body())
            return
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": self._settings.name}


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def _reason(answer: Any) -> str:
    return "stop" if answer.finished else "length"


def _usage(said: Said) -> dict[str, int]:
    answered = sum(answer.tokens for answer in said.answers)
    return {"prompt_tokens": said.prompt_tokens, "completion_tokens": answered, "total_tokens": said.prompt_tokens + answered}


async def _left(request: Request) -> None:
    """Returns when whoever asked has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return JSONResponse(error.body(), status_code=error.status)


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    told = BadRequest(f"there is no {request.method} {request.url.path} here", None, "unknown_url", status)
    return JSONResponse(told.body(), status_code=status)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(BadRequest(f"{type(error).__name__}: {error}", status=500).body(), status_code=500)
