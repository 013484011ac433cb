"""How a running attempt reports to the operator and is told to stop: one ConfigMap, the least rights that can work.

The head pod runs `follow` in a thread beside the program. Every few seconds it reads what the trainer wrote in the stage's directory
(`metrics.jsonl`, checkpoints, `result.json`) and patches `progress.json` of the one ConfigMap that its ServiceAccount may read and
patch. In the same round it reads `directive.json`, where the operator asks for a checkpoint and an end (suspend, cancel).

One writer at a time: a writer first claims the ConfigMap under its stage, attempt and RayCluster (`holder.json`); the claim of a
newer attempt, or of the same attempt started again after a preemption, makes every older writer `Fenced` at its next round. All
writes carry the resourceVersion that was read, so two writers cannot interleave. Stages that run side by side each have keys of
their own there, which begin with `s<stage index>.`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from terrace.cluster.api import Api, ApiError, Conflict
from terrace.cluster.attempt_files import Fenced
from terrace.cluster.credentials import connect

logger = logging.getLogger("terrace.progress")
TAIL_BYTES = 65_536
MAX_METRICS, MAX_RESULT_BYTES = 32, 32_768
MAX_CONFLICTS = 5
REPORT_SECONDS = 10.0


@dataclass
class ProgressChannel:
    """One attempt's end of the channel. `cluster` tells two starts of the same attempt apart (the RayCluster's name)."""

    api: Api
    config_map: str
    stage: str
    attempt: int
    cluster: str
    prefix: str = ""  # of this stage's keys
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def holder(self) -> dict[str, Any]:
        return {"stage": self.stage, "attempt": self.attempt, "cluster": self.cluster}

    def claim(self) -> dict[str, Any]:
        """Become the writer; returns the report that was there. Fenced where a newer attempt of the stage has it."""

        def change(data: dict[str, Any]) -> dict[str, Any]:
            current = self._read(data, "holder.json")
            if current.get("stage") == self.stage and current.get("attempt", 0) > self.attempt:
                raise Fenced(f"attempt {self.attempt} of {self.stage} was overtaken by attempt {current['attempt']}")
            return {f"{self.prefix}holder.json": _text(self.holder)}

        return self._read(self._write(change), "progress.json")

    def _read(self, data: dict[str, Any], key: str) -> dict[str, Any]:
        return _parse(data.get(self.prefix + key))

    def report(self, values: dict[str, Any]) -> str | None:
        """Write a report; returns why to stop, None to go on. Fenced where another start of the stage has taken over."""
        report = {**self.holder, "time": datetime.now(UTC).isoformat(timespec="seconds"), **values}

        def change(data: dict[str, Any]) -> dict[str, Any]:
            holder = self._read(data, "holder.json")
            if not holder:  # somebody deleted the ConfigMap and the operator made it anew
                return {f"{self.prefix}holder.json": _text(self.holder), f"{self.prefix}progress.json": _text(report)}
            if holder != self.holder:
                raise Fenced(f"attempt {self.attempt} of {self.stage} in {self.cluster} no longer owns the progress channel")
            if self._done(data):
                return {}  # an earlier start of this very attempt had finished: its word stands
            if {**self.last, "time": 0} == {**report, "time": 0}:
                return {}  # nothing new: reading the directive is enough, and silence shows as silence
            return {f"{self.prefix}progress.json": _text(report)}

        data = self._write(change)
        if self._done(data) and "result" not in values:
            return "an earlier start of this attempt has reported the stage's result: there is nothing left to do"
        self.last = report
        directive = self._read(data, "directive.json")
        meant = directive.get("stage") == self.stage and directive.get("attempt") == self.attempt
        return str(directive["stop"]) if meant and directive.get("stop") else None

    def _done(self, data: dict[str, Any]) -> bool:
        """Whether a result with a good end is on record for this attempt (its pods were taken before anybody had read it)."""
        report = self._read(data, "progress.json")
        own = (report.get("stage"), report.get("attempt")) == (self.stage, self.attempt)
        return own and report.get("result") is not None and (report.get("exit") or {}).get("status") == 0

    def _write(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Read, change, write if nobody wrote in between; returns the data as it was read."""
        for _ in range(MAX_CONFLICTS):
            body = self.api.get("ConfigMap", self.config_map)
            if body is None:
                raise ApiError(f"ConfigMap {self.config_map} is gone", 404)
            data = body.get("data") or {}
            new = change(data)
            if not new:
                return data
            try:
                version = {"resourceVersion": body["metadata"]["resourceVersion"]}
                self.api.patch("ConfigMap", self.config_map, {"metadata": version, "data": new})
                return data
            except Conflict:
                continue
        raise ApiError(f"ConfigMap {self.config_map} changed {MAX_CONFLICTS} times while a report was written", 409)


def channel_from_environment(stage: str, attempt: int) -> ProgressChannel | None:
    """The channel of the pod this process runs in; None outside of a Curriculum."""
    config_map = os.environ.get("TERRACE_PROGRESS")
    if not config_map:
        return None
    cluster = os.environ.get("RAY_CLUSTER_NAME", "")
    prefix = os.environ.get("TERRACE_PROGRESS_PREFIX", "")
    return ProgressChannel(connect(os.environ.get("TERRACE_NAMESPACE")), config_map, stage, attempt, cluster, prefix)


class Follower:
    """Reports in a thread while the program runs. A report that fails is logged and tried again: training never waits for it."""

    def __init__(self, channel: ProgressChannel, stage_directory: str, on_stop: Callable[[str], None],
                 on_fenced: Callable[[str], None], seconds: float = REPORT_SECONDS) -> None:  # fmt: skip
        self._channel, self._directory, self._seconds = channel, stage_directory, seconds
        self._on_stop, self._on_fenced = on_stop, on_fenced
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        """Claim the channel (Fenced where a newer attempt has it), then report in the background."""
        self._channel.claim()
        self._thread.start()

    def finish(self, exit_status: int, message: str = "") -> None:
        """The last report: how the program ended. Tried until it is written or a minute has passed."""
        self._end.set()
        self._thread.join(timeout=30)
        values = read_progress(self._directory) | {"exit": {"status": exit_status, "message": message[:1000]}}
        if exit_status != 0:
            values.pop("result", None)
        waiting = threading.Event()
        for _ in range(12):
            try:
                self._channel.report(values)
                return
            except Fenced as error:
                logger.warning("%s; its end is not reported", error)
                return
            except ApiError as error:
                logger.warning("the last report is tried again: %s", error)
                waiting.wait(5.0)

    def _run(self) -> None:
        while True:
            try:
                reason = self._channel.report(read_progress(self._directory))
                if reason:
                    self._on_stop(reason)
            except Fenced as error:
                self._on_fenced(str(error))
                return
            except (ApiError, OSError) as error:
                logger.warning("progress was not reported: %s", error)
            if self._end.wait(self._seconds):
                return


def read_progress(stage_directory: str) -> dict[str, Any]:
    """What the trainer has written in the stage's directory (a path or s3:// URI), in the words of the report."""
    from terrace.storage import files as storage

    def read(name: str, tail: int = 0) -> bytes:
        uri = storage.join(stage_directory, name)
        size = storage.file_size(uri)
        if not size:
            return b""
        if tail and size > tail:
            return storage.read_ranges(uri, [(size - tail, tail)])[0]
        return storage.read_file(uri)

    values: dict[str, Any] = {"step": 0, "total_steps": int(_parse_bytes(read("plan.json")).get("total_steps", 0))}
    step = _last_line(read("metrics.jsonl", TAIL_BYTES))
    if step:
        values["step"] = int(step.get("step", 0))
        values["metrics"] = {
            key: f"{value:.6g}" for key, value in sorted(step.items())
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step" and math.isfinite(value)
        }  # fmt: skip
        values["metrics"] = dict(list(values["metrics"].items())[:MAX_METRICS])
    if checkpoint := _newest_checkpoint(stage_directory):
        values["checkpoint"] = checkpoint
    if result := _parse_bytes(read("result.json")):
        values["result"] = _small(result)
    return values


def _newest_checkpoint(stage_directory: str) -> dict[str, Any] | None:
    """The highest complete step (of a run on S3: by its fence; else its folder has a manifest). The trainer checks it in full."""
    from terrace.cluster.attempt_outcome import newest_checkpoint_step
    from terrace.storage import files as storage
    from terrace.storage.faults import StorageError
    from terrace.storage.mirror import uri_of

    folder = storage.join(stage_directory, "checkpoints")
    if not storage.is_remote(stage_directory) and (uri := uri_of(Path(stage_directory))) is not None:
        step = newest_checkpoint_step(Path(stage_directory))
        return None if step is None else {"uri": f"{uri}/checkpoints/step-{step:06d}", "step": step}
    try:
        files = storage.list_files(folder)
    except (OSError, StorageError):
        return None
    steps = []
    for file in files:
        parts = file.uri.rsplit("/", 2)
        if parts[-1] == "manifest.json" and parts[-2].startswith("step-") and parts[-2][5:].isdigit():
            steps.append((int(parts[-2][5:]), file.uri.rsplit("/", 1)[0]))
    if not steps:
        return None
    step, uri = max(steps)
    return {"uri": uri, "step": step}


def _small(result: dict[str, Any]) -> dict[str, Any]:
    """What gates need. A ConfigMap and a status have room for that and not for everything."""
    kept = {key: result[key] for key in ("steps", "loss", "evaluation", "suites", "tokens", "samples", "seconds") if key in result}
    if len(_text(kept)) > MAX_RESULT_BYTES:
        kept["evaluation"] = {"after": (result.get("evaluation") or {}).get("after", {})}
    return kept


def _last_line(data: bytes) -> dict[str, Any]:
    """The last whole line; the one being written is passed over."""
    for line in reversed(data.split(b"\n")[:-1]):
        if found := _parse_bytes(line):
            return found
    return {}


def _parse_bytes(data: bytes) -> dict[str, Any]:
    return _parse(data.decode("utf-8", "replace")) if data else {}


def _parse(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
