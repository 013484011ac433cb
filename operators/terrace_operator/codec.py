"""The state machine's values to and from JSON, for `status.controller`.

The journal of a run under the operator is the status: it holds the folded state instead of the events, because a resource has
room for the one and not for the other. Unknown keys are dropped and missing ones take their defaults, so that an older and a newer
operator read each other's status.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
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
    edits_ignored: list[str] = field(default_factory=list)  # stages whose edit came too late


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    return {key: value for key, value in values.items() if key in names}


def encode(state: RunState, memory: Memory) -> dict[str, Any]:
    machine = {
        item.name: getattr(state, item.name) for item in fields(RunState) if item.name not in ("stages", "commands")
    }
    machine["commands"] = sorted(state.commands)[-8:]
    machine["stages"] = [_compact(stage) for stage in state.stages]
    return {"machine": machine, "operator": {item.name: getattr(memory, item.name) for item in fields(Memory)}}


def _compact(stage: StageState) -> dict[str, Any]:
    """Only what differs from a fresh stage: 32 stages must fit in a status with room to spare."""
    fresh = StageState(stage.name, stage.index)
    values = {item.name: getattr(stage, item.name) for item in fields(StageState)}
    shown = {key: value for key, value in values.items() if key in ("name", "index") or value != getattr(fresh, key)}
    if "gates" in shown:
        shown["gates"] = {str(number): gate for number, gate in stage.gates.items()}
    return shown


def decode(value: dict[str, Any], stage_names: list[str]) -> tuple[RunState, Memory]:
    """The stored state, with stages in the recipe's order; stages added to the recipe since then are pending."""
    machine, operator = value.get("machine") or {}, value.get("operator") or {}
    state = new_state(stage_names)
    for key, content in _known(RunState, machine).items():
        if key not in ("stages", "commands"):
            setattr(state, key, content)
    state.commands = set(machine.get("commands", ()))
    stored = {stage["name"]: stage for stage in machine.get("stages", ())}
    for index, name in enumerate(stage_names):
        if name in stored:
            values = _known(StageState, stored[name]) | {"index": index}
            values["gates"] = {int(number): dict(gate) for number, gate in values.get("gates", {}).items()}
            state.stages[index] = StageState(**values)
    return state, Memory(**_known(Memory, operator))
