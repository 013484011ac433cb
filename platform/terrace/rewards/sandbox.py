"""Killable subprocesses that evaluate model text under time and memory limits.

A rule runs on one item at a time in a worker process. An item that exceeds `item_seconds` costs that once: the process
is killed, the item's outcome is a failure with its reason, a fresh process goes on with the next item. Start of a
process: about 0.5 s with sympy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import terrace
from terrace.errors import TerraceError
from terrace.rewards.ready import stated_solution
from terrace.rewards.registry import BUILT_IN
from terrace.rewards.types import Judgement, Outcome, RewardItem, outcomes_of

LOGGER = logging.getLogger(__name__)
START_SECONDS = 120.0
WORKER = ("-m", "terrace.rewards.sandbox_worker")


class SandboxError(TerraceError):
    """The sandbox itself cannot work (no process starts, or the rule cannot be imported)."""


class _Killed(Exception):
    """The worker process was killed or died; `reason` says why."""


class _Process:
    """One worker process and the bytes read from it so far."""

    def __init__(self, memory_bytes: int, item_seconds: float) -> None:
        package_root = str(Path(terrace.__path__[0]).parent)
        search_path = os.pathsep.join([package_root, *(path for path in sys.path if path and path != package_root)])
        self._scratch = tempfile.mkdtemp(prefix="terrace-sandbox-")
        os.chmod(self._scratch, 0o777)  # root's rules run as a user of their own
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process; a rule may write 16 MiB there
        self._process = subprocess.Popen(
            [sys.executable, *WORKER, str(memory_bytes), str(item_seconds), self._scratch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=clean_environment(search_path, self._scratch),
            start_new_session=True,
        )
        self.held: list[str] = []
        self._buffer = b""

    def send(self, request: dict) -> None:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise _Killed(self._end_reason()) from error

    def receive(self, seconds: float) -> dict:
        """The next answer; raises `_Killed` when none comes in time or the process has ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not _readable(self._process.stdout, remaining):
                self.kill()
                raise _Killed(f"time limit of {seconds:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise _Killed(self._end_reason())
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def _end_reason(self) -> str:
        self.kill()
        status = self._process.returncode
        if status and status < 0:
            return f"process ended by signal {-status}"
        said = self.last_words()
        return f"process ended with status {status}" + (f": {said}" if status and said else "")

    def last_words(self) -> str:
        """The last line on the process' error output."""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 2000))
        lines = [line for line in self._errors.read().decode(errors="replace").split("\n") if line.strip()]
        return lines[-1][:300] if lines else ""

    def kill(self) -> None:
        """End the guard and everything below it, also what left its session (see sandbox_worker)."""
        if self._process.poll() is None:
            try:
                self._process.wait(timeout=0.2)  # one that ends by itself keeps its own status
            except subprocess.TimeoutExpired:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def _readable(file: Any, seconds: float) -> bool:
    """Whether something can be read within so many seconds, whatever the number of the file's descriptor (select stops at 1,024)."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(file, selectors.EVENT_READ)
        return bool(waiting.select(seconds))


def clean_environment(search_path: str, scratch: str) -> dict[str, str]:
    """The whole environment of a rule: what Python needs, and nothing of the stage's keys and tokens."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH") if name in os.environ}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **threads, "PYTHONPATH": search_path, "PYTHONDONTWRITEBYTECODE": "1", "HOME": scratch, "TMPDIR": scratch}


@dataclass
class _Job:
    """Items of one `judge` call that a worker thread takes together."""

    rule: str
    options: dict[str, Any]
    items: Sequence[RewardItem]
    outcomes: list[Outcome | None]
    places: range
    checks: bool = False  # whether this job only asks if the rule can judge at all
    steps: bool = False  # of an environment: `items` are its calls, `outcomes` become its answers, as JSON gives them
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class SandboxPool:
    """`workers` killable processes. Thread-safe; `close()` (or leaving the `with` block) ends the processes."""

    def __init__(
        self, workers: int = 2, item_seconds: float = 5.0, memory_bytes: int = 2**30, items_per_request: int = 16
    ) -> None:
        self.item_seconds = item_seconds
        self._memory_bytes = memory_bytes
        self._items_per_request = items_per_request
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._closing = threading.Lock()  # between putting jobs and closing: no job may end up behind the last one taken
        self._closed = False
        self.held: tuple[str, ...] = ()  # the protections that hold, known with the first judgement
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"reward-sandbox-{i}") for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def judge(self, rule: str, items: Sequence[RewardItem], options: dict[str, Any] | None = None) -> list[Outcome]:
        """Outcomes in the order of the items; blocks until the last is there. Errors of the sandbox itself are raised."""
        outcomes: list[Outcome | None] = [None] * len(items)
        jobs = []
        for start in range(0, len(items), self._items_per_request):
            places = range(start, min(start + self._items_per_request, len(items)))
            jobs.append(_Job(rule, options or {}, [items[place] for place in places], outcomes, places))
        with self._closing:
            if self._closed:
                raise SandboxError(f"reward {rule!r}: the sandbox is closed")
            for job in jobs:
                self._jobs.put(job)
        for job in jobs:
            job.done.wait()
            if job.error is not None:
                raise SandboxError(f"reward {rule!r}: {job.error}") from job.error
        return [outcome if outcome is not None else Outcome(None, f"{rule}: not judged") for outcome in outcomes]

    def step(self, environment: str, call: dict[str, Any], options: dict[str, Any] | None = None) -> dict[str, Any]:
        """One call of an environment (rewards.environment), under the limits of a rule: its answer, or `{"failure": why}`."""
        answers: list[Any] = [None]
        job = _Job(environment, options or {}, [call], answers, range(1), steps=True)  # type: ignore[list-item]
        with self._closing:
            if self._closed:
                raise SandboxError(f"environment {environment!r}: the sandbox is closed")
            self._jobs.put(job)
        job.done.wait()
        if job.error is not None:
            raise SandboxError(f"environment {environment!r}: {job.error}") from job.error
        return answers[0]

    def close(self) -> None:
        """Ends the processes. Who waits for an outcome that nobody needs any more gets a `SandboxError` now."""
        with self._closing:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while (job := self._jobs.get_nowait()) is not None:
                    job.error = SandboxError("the sandbox was closed before these items were judged")
                    job.done.set()
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=2 * self.item_seconds + 5)

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        process: _Process | None = None
        while (job := self._jobs.get()) is not None:
            try:
                process = self._do(job, process)
            except BaseException as error:
                job.error, process = error, None
                LOGGER.warning("reward sandbox: %s", error)
            finally:
                job.done.set()
        if process is not None:
            process.kill()

    def _do(self, job: _Job, process: _Process | None) -> _Process | None:
        place, starts_without_answer = 0, 0
        while place < len(job.items):
            if process is None:
                process = _Process(self._memory_bytes, self.item_seconds)
            begun = False
            try:
                items = list(job.items) if job.steps else [tuple(item) for item in job.items[place:]]
                process.send({"rule": job.rule, "options": job.options, "steps": job.steps, "items": items})
                process.held = process.receive(START_SECONDS).get("held", [])
                begun = True
                self._tell(process.held)
                while place < len(job.items):
                    if self._closed:
                        process.kill()
                        raise SandboxError("the sandbox was closed before these items were judged")
                    answer = process.receive(self.item_seconds)
                    if answer.get("restart"):
                        process.kill()
                        process = None
                    self._record(job, place, answer, "restart" in answer)
                    place += 1
                    if process is None:
                        break
            except _Killed as reason:
                process = None
                if begun:
                    self._record(job, place, {"failure": str(reason)}, True)
                    place += 1
                    continue
                starts_without_answer += 1
                if starts_without_answer >= 3:
                    raise SandboxError(
                        f"the process ends before it can judge anything ({reason}); import the rule by hand"
                    ) from None
        return process

    def _record(self, job: _Job, place: int, answer: dict, killed: bool = False) -> None:
        if job.steps:
            job.outcomes[job.places[place]] = answer  # type: ignore[call-overload]
            return
        if "failure" not in answer:
            value = answer["value"]
            (outcome,) = outcomes_of([None if value is None else Judgement(value, answer["read"], answer["rule"])], job.rule, 1)
            outcome = replace(outcome, seconds=answer.get("seconds", 0.0))
        elif not job.checks and (killed or job.rule in BUILT_IN) and self._judges_its_own(job, job.items[place]):
            # The rule judges the solution itself: the response is what breaks it, and that is no right answer.
            outcome = Outcome(0.0, None, "", f"the response breaks the judge: {answer['failure']}")
        else:
            outcome = Outcome(None, f"{job.rule}: {answer['failure']}")
        job.outcomes[job.places[place]] = outcome

    def _judges_its_own(self, job: _Job, item: RewardItem) -> bool:
        """Whether the rule gives full value to a response that states the solution, in a process of its own."""
        response = stated_solution(job.rule, item, job.options)
        if response is None:
            return False
        check = _Job(job.rule, job.options, [item._replace(response=response)], [None], range(1), checks=True)
        process = self._do(check, None)
        if process is not None:
            process.kill()
        return check.outcomes[0] is not None and check.outcomes[0].value is not None and check.outcomes[0].value > 1 - 1e-6

    def _tell(self, held: list[str]) -> None:
        """Say once what keeps the rules in, so that a reader of the log knows what held where it ran."""
        if held and not self.held:
            self.held = tuple(held)
            LOGGER.info("reward sandbox holds: %s", ", ".join(held))
