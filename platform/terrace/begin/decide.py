"""What a recipe for this checkpoint, these rows and this machine says, and why: pure functions over what was looked at.

Rates and what trains follow what published fine-tunings do (the tower stays, projector and language model move, about 1e-5
for models of billions); lengths and pictures follow the rows; precision and distribution follow the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from terrace.begin.rows import Looked
from terrace.errors import InputError
from terrace.families.interface import Bounds, Family

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MOST_PIXELS = 1_003_520  # of a picture, unless the rows want less: 1,280 visual tokens of Qwen2.5-VL
ROOM_FOR_TEXT = 64  # tokens beside the largest picture
SAMPLES_PER_STEP = 32
WINDOW = 2_000  # samples that are packed together; fewer where there are fewer
RATES = ((1e9, 1e-5), (1e8, 5e-5), (1e7, 2e-4), (0, 1e-3))  # parameters from which -> learning rate of the language model
TASK_REWARDS = {  # task of prompts -> reward that judges it
    "counting": "counting", "grounding": "grounding", "gui": "gui_point", "gui_point": "gui_point", "ocr": "ocr", "chart": "chart",
    "caption": "caption", "visual_math": "visual_reasoning", "visual_reasoning": "visual_reasoning", "text_math": "text_reasoning",
    "text_reasoning": "text_reasoning", "math": "math", "temporal_grounding": "temporal_grounding", "tool_call": "tool_call",
}  # fmt: skip
ALL_PARTS = {"vision": 0.2, "projector": 1.0, "language": 1.0}  # part -> its rate as a share of the language model's
PATHS: dict[str, tuple[tuple[str, Mapping[str, float], float], ...]] = {  # stages -> (name, parts, epochs)
    "sft": (("sft", {"projector": 1.0, "language": 1.0}, 3.0),),
    "warmup+sft": (("projector-warmup", {"projector": 100.0}, 0.3), ("sft", {"projector": 1.0, "language": 1.0}, 3.0)),
    "curriculum": (
        ("projector-warmup", {"projector": 100.0}, 0.3), ("alignment", {"vision": 1.0, "projector": 1.0}, 0.5),
        ("multimodal", ALL_PARTS, 1.5), ("long-context", ALL_PARTS, 0.5),
    ),
    "morl": (("sft", {"projector": 1.0, "language": 1.0}, 3.0), ("morl", {"projector": 0.1, "language": 0.1}, 0.0)),
}  # fmt: skip
LEARNT_FIRST = ("caption", "ocr", "document")  # kinds of a curriculum's alignment


@dataclass(frozen=True)
class Checkpoint:
    """A model directory, as far as it was looked at."""

    directory: str
    architecture: str
    family: Family
    pixels: Bounds | None  # its own, of its preprocessor_config.json
    longest: int  # positions that it has
    parameters: int


@dataclass(frozen=True)
class Machine:
    gpus: int
    gpu_name: str | None  # in the planner's table; None: not there, or no GPU
    memory_bytes: float  # of the host
    cpus: int


@dataclass
class StageChoice:
    name: str
    trains: dict[str, float]  # part -> learning rate
    sources: list[str]
    budget: dict[str, float]
    sequence_length: int
    objective: str = "lm"
    rewards: dict[str, str] = field(default_factory=dict)  # task -> reward


@dataclass
class Choice:
    """Everything that the recipe will say, and a line for each decision: (what, why)."""

    stages: list[StageChoice]
    pixels: Bounds
    packs: int
    window: int | None
    precision: str
    workers: int
    holdout: dict[str, int]
    told: list[tuple[str, str]]


def decide(checkpoint: Checkpoint, sources: Sequence[Looked], path: str, machine: Machine) -> Choice:
    """The recipe's values. Raises InputError where the rows have nothing for a stage."""
    told: list[tuple[str, str]] = []
    supervised = [source for source in sources if source.kind not in ("prompt", "preference")]
    prompts = [source for source in sources if source.kind == "prompt"]
    _check_kinds(sources, supervised, prompts, path)
    told.append(("family", f"{checkpoint.architecture}, as config.json of the checkpoint says; {checkpoint.parameters:,} parameters"))
    pixels = _pixels(checkpoint, sources, told)
    lengths = {source.name: source.lengths(pixels, checkpoint.family) for source in sources}
    trained = supervised if supervised else prompts
    length = _sequence_length(checkpoint, [lengths[source.name] for source in trained], pixels, told)
    rate = next(rate for size, rate in RATES if checkpoint.parameters >= size)
    stages = []
    for name, parts, epochs in PATHS[path]:
        if name == "morl":
            stages.append(_reinforced(name, parts, prompts, rate, length, checkpoint))
            continue
        if not supervised:
            continue
        chosen = [source.name for source in _of_stage(name, supervised)]
        own = min(checkpoint.longest, 4 * length) if name == "long-context" else length
        stages.append(StageChoice(name, {part: share * rate for part, share in parts.items()}, chosen, {"epochs": epochs}, own))
    told.append(("trains", _trains(stages, rate, checkpoint.parameters)))
    mean = float(np.mean(np.concatenate([lengths[source.name] for source in trained])))
    workers = max(1, machine.gpus)
    packs = max(1, round(SAMPLES_PER_STEP * mean / length))
    packs = -(-packs // workers) * workers
    told.append(("batch", f"{packs} pack{'s' if packs > 1 else ''} a step: about {max(1, round(packs * length / mean))} samples"))
    rows = sum(source.rows for source in trained)
    window = None if rows >= WINDOW else max(16, rows // 4)
    if window is not None:
        told.append(("window", f"{window} samples are packed together, so that {rows:,} rows make several windows an epoch"))
    precision = "bf16" if machine.gpus else "fp32"
    told.append(("precision", f"{precision}: this machine has " + ("GPUs" if machine.gpus else "no GPU, and CPUs are slow in bf16")))
    holdout = {source.name: max(1, min(64, source.rows // 20)) for source in sources}
    told.append(("held out", f"{sum(holdout.values())} samples never train; their loss before and after each stage says what was learned"))
    return Choice(stages, pixels, packs, window, precision, workers, holdout, told)


def _check_kinds(sources: Sequence[Looked], supervised: Sequence[Looked], prompts: Sequence[Looked], path: str) -> None:
    for source in sources:
        if source.kind == "preference":
            raise InputError(f"{source.uri}: these are preference rows, which no stage of {path} learns from; leave them out of --data")
        if source.kind == "prompt" and path != "morl":
            raise InputError(f"{source.uri}: these are prompts without an answer to learn; use --stages morl, or leave them out of --data")
    if path == "morl" and not prompts:
        raise InputError("--stages morl wants prompts with a solution among --data (rows whose last turn is the user's)")
    if not supervised and path != "morl":
        raise InputError("--data holds nothing that a supervised stage learns from")


def _pixels(checkpoint: Checkpoint, sources: Sequence[Looked], told: list[tuple[str, str]]) -> Bounds:
    """(min, max) of a resized picture: the checkpoint's own, no more than a first run should cost."""
    own = checkpoint.pixels or (checkpoint.family.fewest_pixels, MOST_PIXELS)
    areas = np.concatenate([source.areas() for source in sources])
    low, high = own
    why = "as the checkpoint's preprocessor_config.json says" if checkpoint.pixels else "the checkpoint does not say; the usual bounds"
    if high > MOST_PIXELS:
        high, why = MOST_PIXELS, f"the checkpoint allows {own[1]:,}; {MOST_PIXELS:,} bound what a picture costs. Raise it for small print"
    tight = _needed(checkpoint.family, sources, (low, high))
    if tight < high:
        high, why = tight, f"{why}; no picture that was looked at needs more than {tight:,}, larger ones are resized to that"
    if len(areas):
        view = checkpoint.family.view(*_square(float(np.median(areas))), (low, high))
        why += f"; a picture of middle size is {view.tokens} visual tokens"
    told.append(("pixels", f"{low:,} to {high:,}: {why}"))
    return low, high


def _needed(family: Family, sources: Sequence[Looked], bounds: Bounds) -> int:
    """The lowest upper bound under which every picture that was looked at becomes what it becomes within `bounds`."""
    low, high = bounds
    sizes = {size for source in sources for _, of_row in source.measures for size in of_row}
    views = {size: family.view(*size, bounds) for size in sizes}
    tight = max((view.size[0] * view.size[1] for view in views.values()), default=high)
    tight = max(low, family.fewest_pixels, tight)
    return tight if all(family.view(*size, (low, tight)) == view for size, view in views.items()) else high


def _square(area: float) -> tuple[int, int]:
    side = max(1, round(area**0.5))
    return side, side


def _sequence_length(checkpoint: Checkpoint, lengths: Sequence[np.ndarray], pixels: Bounds, told: list[tuple[str, str]]) -> int:
    every = np.concatenate(lengths)
    longest, mean = int(every.max()), float(every.mean())
    picture = checkpoint.family.largest_image_tokens(pixels[1])
    # The rows that were not looked at may be a little longer, packs want several samples, and the largest picture must fit.
    wanted = max(longest * 1.25, 4 * mean, picture + ROOM_FOR_TEXT)
    found = next((length for length in LENGTHS if length >= wanted), LENGTHS[-1])
    length = min(found, checkpoint.longest)
    why = f"the longest row that was looked at has {longest:,} tokens, the mean {mean:,.0f}"
    if length < longest:
        why += f"; the model has no more positions, and {int((every > length).sum())} rows are longer: they are refused and counted"
    told.append(("sequence", f"{length:,} tokens: {why}"))
    return length


def _of_stage(name: str, supervised: Sequence[Looked]) -> list[Looked]:
    """The sources of a stage: those with pictures for the projector, captions and reading for an alignment, otherwise all."""
    pictured = [source for source in supervised if source.with_images]
    if name == "projector-warmup":
        captions = [source for source in pictured if source.kind == "caption"]
        return captions or pictured or list(supervised)
    if name == "alignment":
        return [source for source in pictured if source.kind in LEARNT_FIRST] or pictured or list(supervised)
    return list(supervised)


def _reinforced(
    name: str, parts: Mapping[str, float], prompts: Sequence[Looked], rate: float, length: int, checkpoint: Checkpoint
) -> StageChoice:
    rewards: dict[str, str] = {}
    for source in prompts:
        task = task_of(source)
        if task not in TASK_REWARDS:
            raise InputError(
                f"{source.uri}: which reward judges its answers is not told by its rows (task {task or 'missing'}); give each row a `task`"
                f" of {', '.join(sorted(TASK_REWARDS))}, or write the stage's rewards by hand (docs/rl.md)"
            )
        rewards[task] = TASK_REWARDS[task]
    trains = {part: share * rate for part, share in parts.items()}
    sequence = min(checkpoint.longest, max(length, 1024))
    return StageChoice(name, trains, [source.name for source in prompts], {"steps": 50}, sequence, "grpo", rewards)


def task_of(source: Looked) -> str:
    """What prompts ask for: the task that their rows name, or their file's name where that is one."""
    if source.tasks:
        return source.tasks[0]
    return next((task for task in TASK_REWARDS if task in source.name.lower()), "")


def _trains(stages: Sequence[StageChoice], rate: float, parameters: int) -> str:
    last = next((stage for stage in stages if "language" in stage.trains), stages[-1])
    frozen = [part for part in ("vision", "projector", "language") if part not in last.trains]
    told = f"{', '.join(last.trains)} in {last.name}" + (f"; {', '.join(frozen)} stays as it is" if frozen else "")
    return f"{told}; rate {rate:g} for the language model, as for others of {parameters / 1e6:,.1f} M parameters"


def _mixture(sources: Sequence[str]) -> dict[str, Any]:
    weights = dict.fromkeys(sources, 1.0)
    return weights if len(weights) == 1 else {"weights": weights, "temperature": 1.0}


def recipe_values(name: str, checkpoint: Checkpoint, sources: Sequence[Looked], choice: Choice) -> dict[str, Any]:
    """The recipe as plain values, without its comments."""
    stages = []
    for stage in choice.stages:
        values: dict[str, Any] = {
            "name": stage.name, "train": {part: {"lr": lr} for part, lr in stage.trains.items()},
            "mixture": _mixture(stage.sources),
            "sequence_length": stage.sequence_length, "pixels": {"min": choice.pixels[0], "max": choice.pixels[1]},
            "budget": stage.budget, "batch": {"packs": choice.packs}, "precision": choice.precision,
            "resources": {"workers": choice.workers, "gpus_per_worker": 1 if choice.precision == "bf16" else 0},
            "checkpoint": {"every_steps": 200},
        }  # fmt: skip
        if choice.window is not None:
            values["data_loading"] = {"window_samples": choice.window}
        if stage.objective == "grpo":
            values |= {
                "objective": "grpo", "optimizer": {"weight_decay": 0.0},
                "grpo": {"prompts_per_iteration": 32, "samples_per_prompt": 8, "max_response_tokens": min(512, stage.sequence_length // 2)},
                "rewards": {task: [{"name": reward}] for task, reward in stage.rewards.items()},
            }  # fmt: skip
        stages.append(values)
    named = {}
    for source in sources:
        named[source.name] = {"uri": source.uri, "kind": source.kind, "holdout_samples": choice.holdout[source.name]}
        if source.kind == "prompt":
            named[source.name]["task"] = task_of(source)
        if source.kind in ("text", "document"):
            named[source.name]["too_long"] = "split"
    return {
        "name": name, "model": {"architecture": checkpoint.architecture, "pretrained": checkpoint.directory},
        "tokenizer": checkpoint.directory, "data": {"sources": named}, "stages": stages,
    }  # fmt: skip
