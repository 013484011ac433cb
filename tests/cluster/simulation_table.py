"""The simulation's figures as a table of docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any


def figures(run: Any) -> dict[str, float]:
    phases = Counter(run.status(f"c{number}").get("phase") for number in range(run.curricula))
    calls = sum(count for call, count in run.calls.items() if not call.endswith(" Event"))
    return {
        "curricula": run.curricula, "stage attempts": run.started, "succeeded": phases["Succeeded"],
        "failed (budget spent)": phases["Failed"], "invariants broken": len(run.broken),
        "reconciles per attempt": round(run.reconciles / max(run.started, 1), 1),
        "CPU milliseconds per reconcile": round(1000 * run.reconcile_seconds / max(run.reconciles, 1), 2),
        "API calls per attempt (without events)": round(calls / max(run.started, 1), 1),
        "status writes per attempt": round(run.calls["replace_status Curriculum"] / max(run.started, 1), 1),
        "virtual hours": round(run.clock.forward / 3600, 1),
    }  # fmt: skip


def table(runs: list[tuple[Any, float, float]]) -> str:
    """Markdown: one column per run (with the wall and CPU seconds it took)."""
    rows = [figures(run) | {"wall seconds of the simulation": round(wall, 1), "CPU seconds of the simulation": round(cpu, 1)}
            for run, wall, cpu in runs]  # fmt: skip
    lines = ["| | " + " | ".join(f"{run.curricula} curricula" for run, *_ in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    lines += [f"| {key} | " + " | ".join(f"{row[key]:,}" for row in rows) + " |" for key in rows[0] if key != "curricula"]
    happened = ["exit 1", "exit 137", "hang", "closed as SubmissionFailed", "closed as JobStatusCheckTimeoutExceeded",
                "closed as waits", "closed as never", "submitter lost", "head replaced", "node dies", "preempted by priority",
                "quota reclaimed by its owner",
                "preempted", "deleted by hand", "suspend", "paused", "operator restarts", "clock jumps", "kinds absent",
                "watch events lost", "watch events doubled", "API errors met"]  # fmt: skip
    lines += [f"| what went wrong: {key} | " + " | ".join(f"{run.counts[key]:,}" for run, *_ in runs) + " |" for key in happened]
    lines.append("| programs started beside another branch | " + " | ".join(f"{run.counts[BESIDE]:,}" for run, *_ in runs) + " |")
    return "\n".join(lines)


BESIDE = "started beside another branch"
SECTION = "## Operator simulation"
TEXT = f"""{SECTION}

The operator's controller, unchanged, runs curricula of 8 stages in virtual time on the fake API server with a simulated KubeRay and
Kueue (`python tests/cluster/simulation.py --curricula 100 300 --write docs/reliability.md`). Three curricula in ten have two branches
of two stages. Programs fail, are killed, hang; KubeRay closes their RayJobs with reasons of its own, waits for its submitter, or never
closes them; submitter pods are evicted and head pods replaced; nodes die and their pods never end; two thirds of the curricula fit the
quota, those of the higher priority preempt the others, and a cohort lends quota and takes it back; people suspend, pause and delete
RayJobs; kinds are absent for minutes; watches deliver late, twice or never; API calls fail before or after they took effect; the operator
is killed and restarted; the wall clock jumps by up to an hour. Checked at every start of a program and at the end: no two live attempts
of a curriculum (with branches: of a stage), none before the stages that it waits for, none again after its program reported success,
attempt numbers only grow, every program failure counted that a program reported and no other, no infrastructure failure without
something that struck, budgets respected, nothing stuck. Tests take rules out and see the checks fail.
CPU seconds are of one core of a shared virtual machine; wall seconds are those of an idle one only if nothing else ran.
"""


def write_section(path: Path, text: str) -> None:
    """Replace the section, or append it."""
    before = path.read_text(encoding="utf-8") if path.exists() else "# Reliability\n"
    head, _, rest = before.partition(SECTION)
    after = rest.partition("\n## ")[2]
    section = f"{TEXT}\n{text}\n"
    path.write_text(head.rstrip() + "\n\n" + section + (f"\n## {after}" if after else ""), encoding="utf-8")
