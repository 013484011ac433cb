"""A made run directory for the report's tests: three stages, one of them MORL, with a failure, a preemption, two gates and a pause."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from terrace.evaluate.run import SCORES_VERSION, write_results
from terrace.evaluate.suites import Row
from terrace.recipe.loading import dump_recipe, load_recipe, parse_recipe
from terrace.track.calibration import Calibration, Shown

START = 1_780_000_000.0
DAY = 86_400.0
TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
TASKS = ("counting", "grounding")
PREPARED = {"version": 1, "mark": "abcdef0123456789", "seed": 0, "sources": {}, "storage": {}, "tokenizer_dir": "tokenizer"}
MADE_PICTURE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4//8/AwAI/AL+p5qgoAAAAABJRU5ErkJggg=="
GALLERY = f"""<!doctype html><style>.card {{ color: red }}</style><div class="cards">
<div class="card wrong"><figure><svg class="picture" viewBox="0 0 224 224"><image width="224" height="224" href="{MADE_PICTURE}"/>
<rect x="1.0" y="2.0" width="30" height="40" fill="none"
stroke="#d0343a" stroke-width="2.4" onload="alert(1)" stroke-dasharray="&quot; onload=&quot;alert(3)"/><script>alert(2)</script>
</svg></figure><div class="says"><div class="task">Pointing</div><div class="question">Where is &lt;it&gt;?</div>
<div class="answer">[1, 2, 30, 40]</div><div class="expected">expected [5, 6, 70, 80]</div></div></div>
<div class="card right"><div class="says"><div class="task">Reasoning</div><div class="answer">four</div></div></div></div>"""


def made_recipe(steps: int = 400) -> Any:
    values = load_recipe(TINY).model_dump(mode="json", exclude_none=True)
    warmup, alignment = values["stages"][:2]
    for stage in (warmup, alignment):
        stage |= {"budget": {"steps": steps}, "checkpoint": {"every_steps": steps // 4}}
    warmup["gates"] = [{"metric": "eval/caption/loss", "below": 3.0}]
    alignment["gates"] = [{"metric": "eval/document/loss", "below": 0.5}]
    values["data"]["sources"]["prompts"] = {"uri": "data/prompts", "kind": "prompt", "task": "counting", "holdout_samples": 4}
    values["data"]["sources"]["boxes"] = {"uri": "data/boxes", "kind": "prompt", "task": "grounding", "holdout_samples": 4}
    morl = {
        **alignment, "name": "morl", "objective": "grpo", "mixture": {"weights": {"prompts": 1.0, "boxes": 1.0}}, "budget": {"steps": 60},
        "train": {"language": {"lr": 1e-4}}, "gates": [],
        "grpo": {"prompts_per_iteration": 4, "samples_per_prompt": 4, "max_response_tokens": 64},
        "rewards": {task: [{"name": task}] for task in TASKS},
    }  # fmt: skip
    return parse_recipe({**values, "name": "made", "stages": [warmup, alignment, morl]})


def write_run(run_dir: Path, steps: int = 400, gallery: bool = True) -> Path:
    """A run whose last stage is at step 40 of 60 and goes on no more."""
    recipe = made_recipe(steps)
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(dump_recipe(recipe))
    events = _events(steps)
    lines = [json.dumps({"sequence": number, **event, "token": 1}) for number, event in enumerate(events, start=1)]
    (run_dir / "journal.jsonl").write_text("\n".join(lines) + '\n{"sequence": 99, "ti')
    (run_dir / "data").mkdir()
    (run_dir / "data" / "prepared.json").write_text(json.dumps(PREPARED))
    for number, stage in enumerate(recipe.stages, start=1):
        folder = run_dir / "stages" / f"{number:02d}-{stage.name}"
        last = 40 if stage.objective == "grpo" else steps
        rows = [_row(step, last, stage, number) for step in range(1, last + 1)]
        (folder / "checkpoints").mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metrics.jsonl").write_text(text + '{"step": 9')  # a line that is being written
        for step in (last // 2, last):
            _checkpoint(folder / "checkpoints" / f"step-{step:06d}", step, number)
        (folder / "checkpoints" / f"step-{last + 1:06d}").mkdir()  # begun, without a manifest
        if stage.objective != "grpo":
            (folder / "final").mkdir()
            (folder / "final" / "model.safetensors").write_bytes(b"\0" * 1000)
            (folder / "result.json").write_text(json.dumps(_result(steps, number)))
            _evaluation(folder / "evaluation", number)
        else:
            (folder / "plan.json").write_text('{"total_steps": 60}')
            (folder / "examples.jsonl").write_text("".join(json.dumps(_example(at, task)) + "\n" for at in (1, 20) for task in TASKS))
            (folder / "calibration.json").write_text(json.dumps(_calibration()))
            lanes = {"decoding": [[0.0, 1.0, 1.0], [1.0, 2.0, 0.5]], "rewards": [[0.5, 1.5, 1], [1.0, 2.5, 1]], "training": [[3, 4, 1]]}
            (folder / "iteration-trace.json").write_text(json.dumps({"iteration": 7, "seconds": 4.0, "lanes": lanes, "idle": 0.25}))
    (run_dir / "stages" / "01-projector-warmup" / "nonfinite.jsonl").write_text('{"step": 7, "samples": ["a<b"], "policy": "skip"}\n')
    if gallery:
        (run_dir / "gallery.html").write_text(GALLERY)
    return run_dir


def _calibration() -> dict[str, Any]:
    """What an on-policy stage keeps of its judgements: one with a reward and a picture, one that could not be judged."""
    calibration = Calibration(0)
    calibration.add([
        Shown("counting", "prompts/1", "How many <img src=x>?", "There are 4.", "4", 1.0, None, {"counting": "'4': number"}, 1),
        Shown("counting", "prompts/2", "And here?", "Two.", "2", None, "the service said no", {}, 2),
    ])  # fmt: skip
    return {**calibration.state(), "pictures": {"prompts/1": [MADE_PICTURE]}}


def _evaluation(folder: Path, number: int) -> None:
    """What `terrace evaluate` leaves: one suite that both stages were asked, of which the second gets more right."""
    right = [place < 2 * number for place in range(6)]
    rows = [
        Row(
            "counting:made", place, f"row-{place}", f"row-{place}", 0, "", f"How many <b>shapes</b>, {place}?", str(place + (not good)),
            str(place), str(place), {"accuracy": float(good)},
        )
        for place, good in enumerate(right)
    ]  # fmt: skip
    score = {"value": sum(right) / 6, "low": 0.1, "high": 0.9, "count": 6}
    suite = {"kind": "counting", "fingerprint": "f", "scores": {"accuracy": score}, "categories": {}}
    write_results(folder, {"version": SCORES_VERSION, "suites": {"counting:made": suite}}, rows)


def _events(steps: int) -> list[dict[str, Any]]:
    def at(seconds: float, event: str, stage: str = "", attempt: int = 0, **more: Any) -> dict[str, Any]:
        own = {"stage": stage} if stage else {}
        return {"time": START + seconds, "event": event, **own, **({"attempt": attempt} if attempt else {}), **more}

    first, second, third = "projector-warmup", "alignment", "morl"
    later = DAY + 400
    return [
        at(0, "run_started", stages=[first, second, third], recipe_hash="0" * 64),
        at(9, "data_prepared", sources={"captions": 60}),
        at(10, "stage_attempt_started", first, 1),
        at(12, "stage_attempt_launched", first, 1),
        at(40, "checkpoint_saved", first, 1, step=steps // 4),
        at(60, "stage_attempt_failed", first, 1, kind="program", reason="ZeroDivisionError", message="rank 0: division by zero <b>",
           retry_at=START + 70),
        at(70, "stage_attempt_started", first, 2),
        at(72, "stage_attempt_launched", first, 2),
        at(150, "checkpoint_saved", first, 2, step=steps),
        at(160, "stage_completed", first, 2, result={"steps": steps}),
        at(160, "gate_passed", first, gate=0, metric="eval/caption/loss", value=2.1),
        at(161, "handed_over", second, **{"from": first}),
        at(161, "stage_attempt_started", second, 1),
        at(162, "stage_attempt_launched", second, 1),
        at(220, "checkpoint_saved", second, 1, step=steps // 2),
        at(230, "stage_attempt_preempted", second, 1, reason="Preempted", message="a checkpoint was saved"),
        at(235, "stage_attempt_started", second, 2),
        at(237, "stage_attempt_launched", second, 2),
        at(380, "stage_completed", second, 2, result={"steps": steps}),
        at(380, "gate_missed", second, gate=0, metric="eval/document/loss", value=0.9),
        at(381, "paused", second, reason="GateMissed", message="stage alignment missed its gate"),
        at(later, "resume_requested"),
        at(later + 1, "handed_over", third, **{"from": second}),
        at(later + 1, "stage_attempt_started", third, 1),
        at(later + 3, "stage_attempt_launched", third, 1),
        at(later + 120, "checkpoint_saved", third, 1, step=40),
    ]  # fmt: skip


def _row(step: int, last: int, stage: Any, number: int) -> dict[str, Any]:
    noise = math.sin(step * 12.9898) * 0.2
    sources = list(stage.mixture.weights)
    row = {
        "step": step, "loss": None if step == 7 else (6.0 / number) * math.exp(-3 * step / last) + 0.6 + noise * 0.3,
        "supervised_tokens": 500, "tokens": 1000, "samples": len(sources) * 2, "grad_norm": None if step == 7 else 1.0 + noise,
        "learning_rate": {part: 1e-3 * (1 - step / last / 2) for part, trained in stage.train if trained is not None},
        "step_seconds": 0.2, "data_wait_seconds": 0.15 if step == 1 else 0.001, "tokens_per_second": 5000 + 500 * noise,
        "pack_fill": 0.98, "samples_per_source": dict.fromkeys(sources, 2), "max_over_mean_cost": 1.0, "visual_tokens": 300 + 40 * noise,
    }  # fmt: skip
    if stage.objective == "grpo" and row["loss"]:
        row["loss"] = 1e-9 * noise
    if step == 7:
        row["skipped"] = True
    if stage.objective == "lm" and step % 100 == 0 and step < last:
        row["evaluation"] = {"caption": 4.0 - step / 200}
    if stage.objective == "grpo" and step % 2 == 1:
        figures = {"groups": 4.0, "reward": 0.1 + 0.02 * step, "pass_rate": 0.5, "zero_variance": 0.2, "response_tokens": 30.0 + step,
                   "truncated": 0.1, "reward_failures": 0.01, "distinct": 0.9, "entropy": 1.2}  # fmt: skip
        row |= {"iteration": step // 2 + 1, "reward": figures["reward"], "tasks": dict.fromkeys(TASKS, figures), "groups_drawn": 8,
                "groups_kept": 6, "rollout_seconds": 2.0, "reward_seconds": 0.2, "kl": 0.01, "clipped": 0.0, "logprob_mismatch_mean": 1e-4,
                "update_seconds": 0.4, "easy_pool": 1}  # fmt: skip
    return row


def _result(steps: int, number: int) -> dict[str, Any]:
    before = {"caption": 6.0 / number, **({"document": 5.0} if number == 2 else {})}
    after = {"caption": 2.1 / number, **({"document": 0.9} if number == 2 else {})}
    return {"steps": steps, "loss": 1.0, "evaluation": {"before": before, "after": after}, "tokens": steps * 1000, "samples": steps * 2,
            "seconds": steps * 0.2, "skipped_steps": 1, "per_source": {}}  # fmt: skip


def _checkpoint(folder: Path, step: int, number: int) -> None:
    folder.mkdir()
    files = {"weights-00000.safetensors": {"bytes": 4_000_000, "sha256": "0"}, "state.json": {"bytes": 300, "sha256": "1"}}
    (folder / "manifest.json").write_text(json.dumps({"attempt": 1, "files": files, "format_version": 1, "step": step}))
    place = {"plan": "feedc0de1234", "window": 2, "pack": step}
    state = {"step": step, "recipe_hash": "f" * 64, "stage_hash": str(number) * 64, "data": place,
             "saved_by": {"strategy": "zero2", "world_size": 4}}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))


def _example(iteration: int, task: str) -> dict[str, Any]:
    answer = {"reward": 1.0, "text": f"answer <i>{iteration}</i>"}
    return {"iteration": iteration, "task": task, "prompt": "p", "question": "How many?", "solution": "4", "best": answer, "worst": answer}
