"""The state machine's values to and from JSON, for `status.controller`.

The journal of a run under the operator is the status: it holds the folded state instead of the events, because a resource has
room for the one and not for the other. Unknown keys are dropped and missing ones take their defaults, so that an older and a newer
operator read each other's status.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from terrace.curriculum.state import RunState, StageState, new_state


@dataclass
class Memory:
    """What the operator itself must remember beyond the state machine, per RayJob name or stage name."""

    admitted_at: dict[str, float] = field(default_factory=dict)  # RayJob -> when it last got its quota
    queue_preemptions: dict[str, int] = field(default_factory=dict)  # stage -> times Kueue took the quota back
    recipe_maps: dict[str, str] = field(default_factory=dict)  # stage -> ConfigMap its newest attempt reads
    stage_hashes: dict[str, str] = field(default_factory=dict)  # stage -> stage_hash at its first attempt
    resume_token: str | None = None  # newest one acted on
    gpu_seconds: int = 0  # held and given back
    holding_gpus: int = 0
    holding_since: float | None = None
    near_limit: bool = False  # told that a limit is nearly reached
    edits_ignored: list[str] = field(default_factory=list)  # stages whose edit came too late


# Written as RFC 3339 with milliseconds: `kubectl describe` shows seconds since the epoch as 1.795890700543093e+09.
TIMES = ("started_at", "attempt_started_at", "completed_at", "failed_at", "retry_at", "stop_deadline", "ended_at",
         "holding_since")  # fmt: skip
FIELDS = {kind: frozenset(item.name for item in fields(kind)) for kind in (RunState, StageState, Memory)}
FRESH = vars(StageState("", 0))


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    known = FIELDS[kind]
    return {key: value for key, value in values.items() if key in known}


def encode(state: RunState, memory: Memory) -> dict[str, Any]:
    machine = {name: value for name, value in vars(state).items() if name not in ("stages", "commands")}
    machine["commands"] = sorted(state.commands)[-8:]
    machine["stages"] = [_compact(stage) for stage in state.stages]
    operator = {**vars(memory), "admitted_at": {name: time_text(value) for name, value in memory.admitted_at.items()}}
    return {"machine": _with_times(machine, time_text), "operator": _with_times(operator, time_text)}


def time_text(seconds: Any) -> Any:
    if not isinstance(seconds, int | float):
        return seconds
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def time_seconds(value: Any) -> Any:
    """The time that was written; a number comes from an older operator."""
    return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else value


def _with_times(values: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: change(value) if name in TIMES else value for name, value in values.items()}


def _compact(stage: StageState) -> dict[str, Any]:
    """Only what differs from a fresh stage: 32 stages must fit in a status with room to spare."""
    shown = {name: value for name, value in vars(stage).items() if value != FRESH[name]}
    shown |= {"name": stage.name, "index": stage.index}
    if "gates" in shown:
        shown["gates"] = {str(number): gate for number, gate in stage.gates.items()}
    return _with_times(shown, time_text)


def decode(value: dict[str, Any], stage_names: list[str]) -> tuple[RunState, Memory]:
    """The stored state, with stages in the recipe's order; stages added to the recipe since then are pending."""
    machine = value.get("machine") or {}
    state = new_state(stage_names)
    for key, content in _with_times(_known(RunState, machine), time_seconds).items():
        if key not in ("stages", "commands"):
            setattr(state, key, content)
    state.commands = set(machine.get("commands", ()))
    stored = {stage["name"]: stage for stage in machine.get("stages", ())}
    for index, name in enumerate(stage_names):
        if name in stored:
            values = _with_times(_known(StageState, stored[name]), time_seconds) | {"index": index}
            values["gates"] = {int(number): dict(gate) for number, gate in values.get("gates", {}).items()}
            state.stages[index] = StageState(**values)
    return state, decode_memory(value)


def decode_memory(value: dict[str, Any]) -> Memory:
    """The operator's own part, on fresh dictionaries: what is read is never changed in place."""
    known = _with_times(_known(Memory, value.get("operator") or {}), time_seconds)
    known["admitted_at"] = {name: time_seconds(item) for name, item in known.get("admitted_at", {}).items()}
    return Memory(**{name: dict(item) if isinstance(item, dict) else item for name, item in known.items()})
