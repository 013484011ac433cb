"""Tool calls: 1 if the response makes exactly the calls of the solution, with equal names and equal arguments as JSON.

The solution is `{"name": .., "arguments": {..}}` or a list of such. A call stands in `<tool_call>` tags, in a code fence, or bare;
arguments may be an object or its JSON text; `function: {name, arguments}` around them is read too. Nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from terrace.rewards.rules.json_answer import json_values, same_json
from terrace.rewards.types import Judgement, RewardItem


def tool_call(items: list[RewardItem], *, ordered: bool = False) -> list[float | None]:
    """Score the calls of each response. `ordered`: several calls must stand in the solution's order."""
    return [_score(item, ordered) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    wanted = _calls(item.solution)
    return None if wanted is None else "\n".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in wanted)


def _score(item: RewardItem, ordered: bool) -> Judgement | None:
    wanted = _calls(item.solution)
    if not wanted:
        return None
    values = json_values(item.response)
    said = _calls(values[0] if len(values) == 1 else values)
    if not said:
        return Judgement(0.0, item.response[-200:], "no call that reads as {name, arguments}")
    read = json.dumps(said, ensure_ascii=False)[:400]
    if len(said) != len(wanted):
        return Judgement(0.0, read, f"{len(said)} calls, expected {len(wanted)}")
    if ordered:
        return Judgement(float(all(map(same_json, wanted, said))), read, "equal calls in order")
    left = list(said)
    for call in wanted:
        match = next((other for other in left if same_json(call, other)), None)
        if match is None:
            return Judgement(0.0, read, f"no call equals {call['name']}")
        left.remove(match)
    return Judgement(1.0, read, "equal calls")


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """`value` as a list of {"name", "arguments"}; None if any part of it is no call."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    entries = value if isinstance(value, list) else [value]
    calls = []
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("function"), dict):
            entry = entry["function"]
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return None
        arguments = entry.get("arguments", entry.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        calls.append({"name": entry["name"], "arguments": arguments})
    return calls
