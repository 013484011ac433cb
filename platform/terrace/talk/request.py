"""A chat completion as OpenAI's API asks for it, read whole: a parameter is understood, or it is refused by its name.

Pictures come as `image_url` parts with data URIs, or bare base64; an address is fetched only from hosts that the server was
told to allow. What has no meaning here (a user's name, a service tier) is accepted; what would change the answer and is
not offered (tools, log-probabilities, penalties) is refused.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from terrace.errors import TerraceError, nearest
from terrace.talk.conversation import Turn
from terrace.talk.talker import Wishes

MOST_ANSWERS = 16
MOST_STOPS = 4
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_UNDERSTOOD = {
    "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options",
}  # fmt: skip
_WITHOUT_MEANING = {"user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {  # parameter -> the values with which it asks for nothing
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": ("none",),
    "verbosity": ("medium",), "web_search_options": (),
}  # fmt: skip
_DATA = re.compile(r"data:(?P<type>[^;,]*)(?:;[^;,]*)*?;base64,(?P<data>.*)", re.DOTALL)


class BadRequest(TerraceError):
    """What OpenAI's API answers with an `error` object: a status, a message, the parameter and a code."""

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.parameter, self.code, self.status = parameter, code, status

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 4096
    most_images: int = 32
    request_bytes: int = 64 * 2**20
    image_bytes: int = 20 * 2**20


@dataclass(frozen=True)
class Request:
    turns: list[Turn]
    wishes: Wishes
    model: str
    stream: bool = False
    include_usage: bool = False


Fetch = Callable[[str], bytes]  # an address to the bytes there; raises BadRequest


def read_request(values: Any, limits: Limits, fetch: Fetch, default_tokens: int = 1024, default_temperature: float = 0.0) -> Request:
    """The request of a parsed JSON body; the defaults are for what it leaves open. Raises BadRequest, naming the parameter."""
    if not isinstance(values, dict):
        raise BadRequest("the body is no JSON object")
    _check_names(values)
    if not isinstance(values.get("model"), str):
        raise BadRequest("name the model (`GET /v1/models` lists it)", "model")
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages is a list of at least one message", "messages")
    turns = [_turn(message, f"messages[{place}]", limits, fetch) for place, message in enumerate(messages)]
    if turns[-1].role != "user":
        raise BadRequest("the last message is the user's: there is nothing to answer", f"messages[{len(turns) - 1}].role")
    for place, turn in enumerate(turns[1:], start=1):
        if turn.role == "system":
            raise BadRequest("a system message stands first", f"messages[{place}].role")
    images = sum(isinstance(part, bytes) for turn in turns for part in turn.content)
    if images > limits.most_images:
        raise BadRequest(f"{images} pictures; this server takes {limits.most_images} in a request", "messages")
    options = _value(values, "stream_options", dict, {})
    if unknown := sorted(set(options) - {"include_usage"}):
        raise BadRequest(f"unknown option {unknown[0]}", f"stream_options.{unknown[0]}")
    stream = _value(values, "stream", bool, False)
    if options and not stream:
        raise BadRequest("stream_options goes with stream: true", "stream_options")
    wishes = _wishes(values, limits, default_tokens, default_temperature)
    return Request(turns, wishes, values["model"], stream, bool(options.get("include_usage")))


def _check_names(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _NOT_OFFERED:
            if value is not None and value not in _NOT_OFFERED[name]:
                raise BadRequest(f"{name} is not offered here; leave it out", name, "unsupported_parameter")
        elif name not in _UNDERSTOOD | _WITHOUT_MEANING:
            raise BadRequest(f"unknown parameter {name}{nearest(name, _UNDERSTOOD)}", name, "unknown_parameter")


def _wishes(values: Mapping[str, Any], limits: Limits, default_tokens: int, default_temperature: float) -> Wishes:
    names = [name for name in ("max_completion_tokens", "max_tokens") if values.get(name) is not None]
    if len(names) > 1:
        raise BadRequest("give max_completion_tokens or max_tokens, not both", "max_tokens")
    most = _number(values, names[0], int, 1, limits.max_tokens, 0) if names else min(default_tokens, limits.max_tokens)
    stop = values.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(word, str) and word for word in stops) or len(stops) > MOST_STOPS:
        raise BadRequest(f"stop is a text or a list of up to {MOST_STOPS} texts", "stop")
    temperature = _number(values, "temperature", float, 0, 2, default_temperature)
    answers = int(_number(values, "n", int, 1, MOST_ANSWERS, 1))
    seed = values.get("seed")
    if seed is not None:
        seed = int(_number(values, "seed", int, -(2**63), 2**63 - 1, 0)) % 2**63
    top_p = _number(values, "top_p", float, 0, 1, 1.0)
    if top_p == 0:
        temperature, top_p = 0.0, 1.0  # the smallest nucleus is the likeliest token
    return Wishes(int(most), float(temperature), float(top_p), seed, tuple(stops), answers)


def _number(values: Mapping[str, Any], name: str, kind: type, low: float, high: float, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    whole = kind is int
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
        raise BadRequest(f"{name} is a {'whole ' if whole else ''}number from {low:g} to {high:g}", name)
    return value


def _value(values: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise BadRequest(f"{name} is {'true or false' if kind is bool else 'an object'}", name)
    return value


# ---------------------------------------------------------------- messages


def _turn(message: Any, where: str, limits: Limits, fetch: Fetch) -> Turn:
    if not isinstance(message, dict):
        raise BadRequest("a message is an object with role and content", where)
    role = ROLES.get(message.get("role", ""))
    if role is None:
        raise BadRequest(f"role is one of {', '.join(ROLES)}; tools are not offered here", f"{where}.role")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in (None, [], ""):
            raise BadRequest(f"{name} of a message has no meaning here", f"{where}.{name}", "unsupported_parameter")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, list) or not content:
        raise BadRequest("content is a text or a list of parts", f"{where}.content")
    return Turn(role, tuple(_part(part, role, f"{where}.content[{place}]", limits, fetch) for place, part in enumerate(content)))


def _part(part: Any, role: str, where: str, limits: Limits, fetch: Fetch) -> str | bytes:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind != "image_url":
        raise BadRequest("a part is {type: text, text} or {type: image_url, image_url: {url}}", where)
    if role != "user":
        raise BadRequest("pictures stand in messages of the user", where)
    image = part.get("image_url")
    image = {"url": image} if isinstance(image, str) else image
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise BadRequest("image_url is an object with a url", f"{where}.image_url")
    if image.get("detail") not in (None, "auto", "high"):
        raise BadRequest("detail is auto or high; the server's --pixels bounds all pictures alike", f"{where}.image_url.detail")
    data = _picture(image["url"], f"{where}.image_url.url", fetch)
    if len(data) > limits.image_bytes:
        raise BadRequest(f"the picture has {len(data):,} bytes; this server takes {limits.image_bytes:,}", f"{where}.image_url.url")
    return data


def _picture(url: str, where: str, fetch: Fetch) -> bytes:
    if url.startswith(("http://", "https://")):
        try:
            return fetch(url)
        except BadRequest as error:
            raise BadRequest(str(error), where, error.code, error.status) from error
    found = _DATA.fullmatch(url)
    if url.startswith("data:") and found is None:
        raise BadRequest("a data URI is data:image/...;base64,...", where)
    if found is not None and found["type"] and not found["type"].startswith("image/"):
        raise BadRequest(f"{found['type']} is no picture", where)
    try:
        data = base64.b64decode(re.sub(r"\s", "", found["data"] if found else url), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest("it is neither an address, a data URI nor base64", where) from error
    if not data:
        raise BadRequest("the picture is empty", where)
    return data
