"""Rules about low-rank adapters: what may go on training, and what it is made of. Names of layers are known to the model alone."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import PARTS, Recipe, Stage


def check(recipe: Recipe, stage: Stage, at: Path, before: Stage | None) -> Iterator[Problem]:
    """`before` is the stage that this one starts from."""
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is None or training.lora is None:
            continue
        key: Path = (*at, "train", part)
        if training.only:
            yield Problem((*key, "only"), "names tensors of the part, and its adapters train in their place; give one of `only` and `lora`")
        doubled = sorted({target for target in training.lora.targets if training.lora.targets.count(target) > 1})
        if doubled:
            yield Problem((*key, "lora", "targets"), f"names {', '.join(doubled)} twice")
    if not any(keeps_adapters(stage)):
        return
    if before is None:
        return  # nothing to keep, which is said elsewhere, or the first stage
    for part in PARTS:
        now, then = (getattr(one.train, part) for one in (stage, before))
        now_lora, then_lora = (one.lora if one is not None else None for one in (now, then))
        key = (*at, "train", part)
        if now_lora != then_lora:
            yield Problem(
                key,
                f"optimizer_state: keep goes on with the adapters of stage `{before.name}`, whose `lora` of {part} is another; give both "
                "stages the same, or set optimizer_state: reset, which merges them into the weights and starts new ones",
            )
        elif now_lora is not None and now.optimizer_state != "keep":
            yield Problem((*key, "optimizer_state"), "is reset while adapters of another part are kept; keep both or neither")


def keeps_adapters(stage: Stage) -> Iterator[bool]:
    """For every part with adapters: whether it goes on with those of the stage before."""
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is not None and training.lora is not None:
            yield training.optimizer_state == "keep"
