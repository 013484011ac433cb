"""Gates: what a finished stage must have reached before anything goes on. Pure."""

from __future__ import annotations

import math
from typing import Any

from terrace.curriculum.state import StageState
from terrace.recipe.schema import Gate


def metric_value(result: dict[str, Any] | None, metric: str) -> float | None:
    """A metric of a finished stage, None if it was not measured or is not finite.

    `train/<name>` is the last step's, `eval/<kind>/loss` the held-out loss after the stage, `eval/loss` its mean over kinds,
    `eval/<figure>` what an RL stage or a reward model measures instead (`eval/reward/<task>`, `eval/preference/accuracy`),
    `eval/<suite>/<name>` a suite's score, and anything else what the stage's result has under `metrics`.
    """
    result = result or {}
    losses = (result.get("evaluation") or {}).get("after") or {}
    group, _, rest = metric.partition("/")
    found = (result.get("metrics") or {}).get(metric)
    if found is None and group == "train":
        found = (result.get("train") or {}).get(rest, result.get(rest))
    elif found is None and group == "eval":
        name, _, score = rest.partition("/")
        if rest == "loss":
            values = [value for value in losses.values() if isinstance(value, int | float)]
            found = sum(values) / len(values) if values else None
        elif rest in losses:
            found = losses[rest]
        elif score == "loss" and name in losses:
            found = losses[name]
        else:
            found = ((result.get("suites") or {}).get(name) or {}).get(score)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def looked_at(gates: list[Gate], stage: StageState) -> list[dict[str, Any]]:
    """Events of the stage's gates that nobody has looked at yet."""
    records: list[dict[str, Any]] = []
    for number, gate in enumerate(gates):
        if number in stage.gates:
            continue
        value = metric_value(stage.result, gate.metric)
        bounds = [f"below {gate.below:g}"] if gate.below is not None else []
        bounds += [f"above {gate.above:g}"] if gate.above is not None else []
        passed = value is not None and (gate.below is None or value < gate.below) and (gate.above is None or value > gate.above)
        seen = "was not measured" if value is None else f"is {value:.6g}"
        records.append(
            {
                "event": "gate_passed" if passed else "gate_missed",
                "stage": stage.name,
                "gate": number,
                "metric": gate.metric,
                "value": value,
                "on_miss": gate.on_miss,
                "message": f"{gate.metric} {seen}; asked: {' and '.join(bounds)}",
            }
        )
    return records


def missed(gates: list[Gate], stage: StageState) -> dict[str, Any] | None:
    """The event of a missed gate that is to stop the run and has not yet; None where there is none."""
    order = {"fail": 0, "pause": 1}
    open_gates = [number for number, seen in stage.gates.items() if not seen["passed"] and not seen["handled"] and number < len(gates)]
    open_gates = sorted((number for number in open_gates if gates[number].on_miss in order), key=lambda n: order[gates[n].on_miss])
    if not open_gates:
        return None
    gate, value = gates[open_gates[0]], stage.gates[open_gates[0]]["value"]
    shown = "not measured" if value is None else f"{value:.6g}"
    message = f"stage {stage.name} missed its gate on {gate.metric} ({shown})"
    event = "run_failed" if gate.on_miss == "fail" else "paused"
    return {"event": event, "stage": stage.name, "reason": "GateMissed", "message": message}
