"""The invariants of the simulation, checked at every start of a program and at the end; what is broken is written down."""

from __future__ import annotations

from typing import Any

STAGES = 8
LIMITS = {"maxRestarts": 3, "maxInfraRestarts": 12, "backoffSeconds": 10, "backoffCapSeconds": 300, "stallTimeoutSeconds": 300,
          "preRunningTimeoutSeconds": 900, "fenceTimeoutSeconds": 240}  # fmt: skip


def check_start(run: Any, curriculum: str, job: str, stage: str, attempt: int) -> None:
    """A program starts: alone (of a graph: of its stage), after all it waits for, never after its own success, with a number never
    used before."""
    other = run.running.get(slot(run, job))
    lives = other is not None and other != job and other in run.store.objects.get("RayJob", {})
    if lives and not (other in run.cluster.dead and deleted_for(run, other) > LIMITS["fenceTimeoutSeconds"]):
        run.broken.append(f"{curriculum}: {job} starts while {other} lives")
    done = run.succeeded.get(curriculum, [])
    index = int(stage.removeprefix("stage"))
    if stage in done:
        run.broken.append(f"{curriculum}: {stage} starts again after its success")
    if not waits_for(run, curriculum, index) <= set(done) or (curriculum not in run.graphs and len(done) != index):
        run.broken.append(f"{curriculum}: {stage} starts after {done}")
    if attempt < run.attempts.get(f"{curriculum} {stage}", 1):
        run.broken.append(f"{curriculum}: attempt {attempt} of {stage} starts after a newer one")
    run.attempts[f"{curriculum} {stage}"] = attempt
    run.running[slot(run, job)] = job
    beside = sum(key.startswith(f"{curriculum}-s") for key in run.running)
    run.counts["started beside another branch"] += beside > 1


def slot(run: Any, job: str) -> str:
    """What one program may hold at a time: the curriculum, or the stage where its stages form a graph."""
    curriculum = job.rsplit("-s", 1)[0]
    return job.rsplit("-", 1)[0] if curriculum in run.graphs else curriculum


def waits_for(run: Any, curriculum: str, index: int) -> set[str]:
    """As `graph_of` writes it: two branches of two stages between the first and the last three."""
    if curriculum not in run.graphs:
        return {f"stage{number}" for number in range(index)}
    return {f"stage{number}" for number in {0: [], 3: [0], 5: [2, 4]}.get(index, [index - 1])}


def graph_of(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """0, then 1-2 beside 3-4, then 5 after both, 6, 7."""
    keys = {3: {"start_from": "stage0"}, 5: {"start_from": "stage2", "after": ["stage4"]}}
    return [stage | keys.get(index, {}) for index, stage in enumerate(stages)]


def deleted_for(run: Any, job: str) -> float:
    return run.clock.forward - run.deleted_at.get(job, run.clock.forward)


def check_budgets(run: Any) -> None:
    for name in run.finished:
        status = run.status(name)
        for stage in status["stages"]:
            key = (name, stage["name"])
            counted, said, struck = stage["restarts"], run.said[key], run.struck[key] + run.refused[name]
            if not said - run.stopped[name] <= counted <= said:
                run.broken.append(f"{name}: {said} programs of {stage['name']} said exit 1, and {counted} were counted")
            if stage["infraRestarts"] > struck:
                run.broken.append(f"{name}: {stage['infraRestarts']} infrastructure failures of {stage['name']} by {struck} strokes")
            over = [stage["restarts"] - LIMITS["maxRestarts"], stage["infraRestarts"] - LIMITS["maxInfraRestarts"]]
            allowed = 1 if status["phase"] == "Failed" and stage["phase"] not in ("Succeeded", "Pending") else 0
            if max(over) > allowed:
                run.broken.append(f"{name}: budget overspent in {stage['name']}: {stage['restarts']}, {stage['infraRestarts']}")
        if status["phase"] == "Failed" and not any(
            s["restarts"] == LIMITS["maxRestarts"] + 1 or s["infraRestarts"] == LIMITS["maxInfraRestarts"] + 1 for s in status["stages"]
        ):
            run.broken.append(f"{name} failed without a spent budget")
        if status["phase"] == "Succeeded" and len(run.succeeded.get(name, [])) != STAGES:
            run.broken.append(f"{name} succeeded with {len(run.succeeded.get(name, []))} stages")
