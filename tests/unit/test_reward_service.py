"""The reward service's routes and the remote client's patience, without Ray; and the hacking alarm."""

from __future__ import annotations

import json
import runpy
import threading
import time
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request

from terrace.errors import InputError
from terrace.recipe.schema_grpo import RewardRule
from terrace.rewards.alarm import AlarmLimits, Form, distinct_share, hacking_alarms
from terrace.rewards.remote import RewardServiceError, remote
from terrace.rewards.router import Router
from terrace.rewards.sandbox import SandboxError, SandboxPool
from terrace.rewards.service import RewardService, _pair
from terrace.rewards.types import RewardItem

ITEMS = [RewardItem("", "4", "4"), RewardItem("", "5", "4"), RewardItem("", "4", "no number")]


@pytest.fixture(scope="module")
def service():
    return RewardService({"counting": [{"name": "counting"}]}, token="secret", sandbox_workers=1)


@pytest.fixture
def client(service):
    async def application(scope, receive, send):
        response = await service(Request(scope, receive))
        await response(scope, receive, send)

    def ask(method, path, token="secret", **keywords):
        import asyncio

        async def go():
            transport = httpx.ASGITransport(app=application)
            async with httpx.AsyncClient(transport=transport, base_url="http://rewards") as session:
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                return await session.request(method, path, headers=headers, **keywords)

        return asyncio.run(go())

    return ask


def test_service_scores_and_reports_failures_as_null(client):
    body = {"items": [{"task": "counting", **item._asdict()} for item in ITEMS]}
    scores = client("POST", "/score", json=body).json()["scores"]
    assert [score["value"] for score in scores] == [1.0, 0.0, None]
    assert "could not judge" in scores[2]["failure"]
    metrics = client("GET", "/metrics").text
    assert 'terrace_reward_responses_total{task="counting",result="scored"} 2' in metrics
    assert 'terrace_reward_responses_total{task="counting",result="failed"} 1' in metrics


def test_service_wants_its_token_and_well_formed_requests(client):
    assert client("GET", "/health", token=None).json()["tasks"] == ["counting"]
    assert client("POST", "/score", token=None, json={"items": []}).status_code == 401
    assert client("POST", "/score", token="wrong", json={"items": []}).status_code == 401
    assert client("GET", "/metrics", token=None).status_code == 401
    assert client("POST", "/score", content=b"{").status_code == 422
    assert client("POST", "/score", json={"items": [{"task": "counting"}]}).status_code == 422
    wrong = client("POST", "/score", json={"items": [{"task": "captioning", "response": "", "solution": ""}]})
    assert wrong.status_code == 422
    assert "captioning" in wrong.text
    assert client("GET", "/nothing").status_code == 404


def test_a_service_that_is_behind_takes_no_more_and_one_that_cannot_judge_says_so(service, client, monkeypatch):
    judged = threading.Event()
    monkeypatch.setattr(service, "_most", 4)
    score = service._router.score
    monkeypatch.setattr(service._router, "score", lambda pairs: (judged.wait(20), score(pairs))[1])
    body = {"items": [{"task": "counting", **item._asdict()} for item in ITEMS]}
    answers = []
    first = threading.Thread(target=lambda: answers.append(client("POST", "/score", json={"items": body["items"] * 3})))
    first.start()  # 9 items where 4 may wait: a request alone is taken whatever its size
    while not service._waiting:
        time.sleep(0.01)
    refused = client("POST", "/score", json=body)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert "9 responses wait to be judged, at most 4 may" in refused.text
    assert client("GET", "/health", token=None).json()["waiting_items"] == 9
    assert "terrace_reward_waiting_items 9" in client("GET", "/metrics").text
    judged.set()
    first.join(20)
    assert answers[0].status_code == 200
    assert client("POST", "/score", json=body).status_code == 200
    assert "terrace_reward_waiting_items 0\n# TYPE terrace_reward_refused_total counter\nterrace_reward_refused_total 1" in client(
        "GET", "/metrics"
    ).text  # fmt: skip

    def broken(*_):
        raise SandboxError("no process starts")

    monkeypatch.setattr(service._pool, "judge", broken)
    assert client("GET", "/health", token=None).status_code == 200  # what was seen a moment ago still holds
    monkeypatch.setattr(service, "_probed", time.monotonic() - 60)
    failing = client("GET", "/health", token=None)
    assert (failing.status_code, failing.json()["error"]) == (503, "no process starts")


def _remote(handler, monkeypatch, **options):
    monkeypatch.setenv("TERRACE_REWARD_TOKEN", "secret")
    return remote(
        ITEMS, url="http://x/", task="counting", pause_seconds=0.001, transport=httpx.MockTransport(handler), **options
    )


def test_remote_retries_a_slow_or_failing_service_and_then_answers(monkeypatch):
    calls = []

    def handler(request):
        calls.append(request)
        if len(calls) == 1:
            raise httpx.ReadTimeout("slow")
        if len(calls) == 2:
            return httpx.Response(503, text="starting")
        return httpx.Response(200, json={"scores": [{"value": 1.0}, {"value": 0.0}, {"value": None}]})

    assert _remote(handler, monkeypatch) == [1.0, 0.0, None]
    assert len(calls) == 3
    assert calls[0].headers["authorization"] == "Bearer secret"


def test_images_travel_only_to_services_that_ask_for_them(monkeypatch):
    """As base64 text there, as bytes again in the service's items; never to a rule in the sandbox."""
    bodies = []

    def handler(request):
        bodies.append(json.loads(request.content)["items"])
        return httpx.Response(200, json={"scores": [{"value": 1.0}]})

    item = RewardItem("", "4", "4", {"images": (b"\xff\xd8", b"\x89PNG"), "tolerance": 1})
    options = {"url": "http://x/", "task": "chat", "transport": httpx.MockTransport(handler)}
    assert remote([item], **options) == [1.0]
    assert remote([item], send_images=True, **options) == [1.0]
    assert bodies[0][0]["metadata"] == {"tolerance": 1}
    assert _pair(bodies[1][0]) == ("chat", item._replace(metadata={"images": [b"\xff\xd8", b"\x89PNG"], "tolerance": 1}))
    with pytest.raises(ValueError, match="base64"):
        _pair({**bodies[1][0], "metadata": {"images": ["no base64!"]}})
    with SandboxPool(1) as pool:
        assert Router({"chat": [RewardRule(name="counting")]}, pool).score([("chat", item)])[0].value == 1.0


def test_remote_errors_are_errors_and_never_zero(monkeypatch):
    def dead(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(RewardServiceError, match="3 attempts"):
        _remote(dead, monkeypatch, attempts=3)
    with pytest.raises(InputError, match="401"):
        _remote(lambda request: httpx.Response(401, text="no"), monkeypatch)
    with pytest.raises(RewardServiceError, match="1 scores for 3"):
        _remote(lambda request: httpx.Response(200, json={"scores": [{"value": 1.0}]}), monkeypatch)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("html", "answers something else than .*<html>please log in</html>"), ("list", "answers something else than"),
        ("other-key", "answers something else than"), ("empty", "answers something else than .*: nothing"),
        ("numbers", "the score of item 0 is 0.5, not"), ("texts", "the score of item 0 is .*not"), ("no-value", "the score of item 0 is"),
        ("few", "answered 1 scores for 3 items"), ("large", "answers more than 16384 bytes"), ("redirect", "status 302"),
        ("drip-body", "not complete after 0.5 s"), ("drip-headers", "not complete after 0.5 s"), ("close", "did not answer in 2 attempts"),
    ],
)  # fmt: skip
def test_a_service_that_misbehaves_is_named(monkeypatch, mode, message):
    monkeypatch.delenv("TERRACE_REWARD_TOKEN", raising=False)
    service = runpy.run_path(str(Path(__file__).with_name("remote_service.py")))["misbehaving_service"]
    begun = time.monotonic()
    with service() as url, pytest.raises((InputError, RewardServiceError), match=message) as caught:
        remote(ITEMS, url=f"{url}/{mode}", task="t", timeout_seconds=0.5, attempts=2, pause_seconds=0.01)
    assert f"{url}/{mode}/score" in str(caught.value)
    assert time.monotonic() - begun < 10


def test_wrong_urls_and_tokens_are_input_errors(monkeypatch):
    with pytest.raises(InputError, match="http://"):
        remote(ITEMS, url="localhost:8100", task="t")
    monkeypatch.setenv("TERRACE_REWARD_TOKEN", "two\nlines")
    with pytest.raises(InputError, match="TERRACE_REWARD_TOKEN holds white space"):
        remote(ITEMS, url="http://localhost:8100", task="t")


def test_alarm_needs_rising_reward_and_collapsing_form():
    limits = AlarmLimits(window=2)
    fine = [Form(0.2, 100, 0.9, 0), Form(0.2, 100, 0.9, 0), Form(0.8, 60, 0.8, 0), Form(0.8, 60, 0.8, 0)]
    assert hacking_alarms("counting", fine, limits) == []
    shorter = fine[:2] + [Form(0.8, 10, 0.8, 0)] * 2
    assert "shrank" in hacking_alarms("counting", shorter, limits)[0]
    repeated = fine[:2] + [Form(0.8, 90, 0.1, 0)] * 2
    assert "distinct" in hacking_alarms("counting", repeated, limits)[0]
    longer = fine[:2] + [Form(0.8, 400, 0.9, 0.9)] * 2
    assert "length limit" in hacking_alarms("counting", longer, limits)[0]
    no_rise = fine[:2] + [Form(0.2, 10, 0.1, 0)] * 2
    assert hacking_alarms("counting", no_rise, limits) == []
    assert hacking_alarms("counting", shorter[:3], limits) == []
    assert distinct_share(["a b", "a  b", "c"]) == pytest.approx(2 / 3)
