"""A trained Bradley-Terry model as a reward: `{name: reward_model, options: {path: <stage>/final}}`.

The value is sigmoid((score - centre) / scale), in (0, 1): a Bradley-Terry score means nothing but in differences, so `centre` and
`scale` (0 and 1) may place it; the stage that trained the model tells mean and deviation of held-out scores. It runs where the
router runs (not in the sandbox: no text is evaluated). For GPUs of its own, serve it: `terrace serve-rewards` on another machine,
and `remote` in the recipe.

A prompt is read as training reads it, conversation and images, and computed once for all responses of its group: one
unit of a pack (models.shared_prompt), as in the reward model's own training. A prompt that cannot be read (its images
were not sent, its text and images disagree, it is too long) gets None, which is counted as a failure.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from terrace.errors import DamagedData, InputError
from terrace.rewards.types import RewardItem

_OPENING = threading.Lock()


@dataclass
class _Group:
    """One prompt, and the answers to it that are judged."""

    prompt: Any  # data.prompt.PromptInputs
    answers: list[list[int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # of the answers among the items


@dataclass(frozen=True)
class _Judge:
    model: Any
    tokenizer: Any
    family: Any  # families.interface.Family
    pixels: tuple[int, int]  # (min, max) of a resized image, as in the stage that trained the model


def reward_model(
    items: Sequence[RewardItem], *, path: str, device: str = "cpu", items_per_batch: int = 16, max_tokens: int = 8192,
    centre: float = 0.0, scale: float = 1.0,
) -> list[float | None]:  # fmt: skip
    """The value of each response to its prompt; None where the prompt cannot be read or a conversation is longer than `max_tokens`."""
    import torch

    from terrace.objectives.reward_model import scores

    if not scale > 0:
        raise InputError(f"reward_model: scale {scale} must be above 0")
    with _OPENING:  # requests that arrive together load it once
        judge = _opened(path, device)
    values: list[float | None] = [None] * len(items)
    for batch in _batches(_grouped(items, judge, max_tokens), items_per_batch):
        with torch.no_grad():
            judged = torch.sigmoid((scores(judge.model, _pair_batch(batch, device)) - centre) / scale).tolist()
        for place, value in zip((place for group in batch for place in group.places), judged):
            values[place] = value
    return values


def _grouped(items: Sequence[RewardItem], judge: _Judge, max_tokens: int) -> list[_Group]:
    """Neighbouring items of one prompt together; items that cannot be judged are left out."""
    from terrace.data.template import encode_answer

    groups: list[_Group] = []
    last: RewardItem | None = None
    group: _Group | None = None
    for place, item in enumerate(items):
        if last is None or (item.prompt, item.metadata) != (last.prompt, last.metadata):
            last, group = item, _read_prompt(item, judge)
            groups += [group] if group else []
        if group is None:
            continue
        answer = encode_answer(item.response, judge.tokenizer, judge.family)
        if len(group.prompt.input_ids) + len(answer) <= max_tokens:
            group.answers.append(answer)
            group.places.append(place)
    return [group for group in groups if group.places]


def _read_prompt(item: RewardItem, judge: _Judge) -> _Group | None:
    """The conversation as training encodes it, with its images. Without `messages`: the prompt's text as one turn."""
    from terrace.data.images import image_size
    from terrace.data.prompt import read_prompt
    from terrace.data.types import Sample

    images = item.metadata.get("images", ())
    if len(images) != len(item.metadata.get("image_sizes") or images):
        return None
    messages = item.metadata.get("messages") or [{"role": "user", "content": [{"type": "text", "text": item.prompt}]}]
    try:
        sizes = [image_size(data) for data in images]
        read = read_prompt(Sample("prompt", "prompt", messages), images, sizes, judge.tokenizer, judge.family, judge.pixels)
    except (InputError, DamagedData, ValueError, IndexError):
        return None
    return _Group(read.inputs)


def _batches(groups: Sequence[_Group], items_per_batch: int) -> list[list[_Group]]:
    """Groups in order, at most `items_per_batch` answers together; a larger group is a batch of its own."""
    batches: list[list[_Group]] = []
    filled = items_per_batch + 1
    for group in groups:
        if filled + len(group.answers) > items_per_batch:
            batches.append([])
            filled = 0
        batches[-1].append(group)
        filled += len(group.answers)
    return batches


def _pair_batch(groups: Sequence[_Group], device: str) -> Any:
    """The groups as units of one pack on the device."""
    import torch

    from terrace.data.types import PackedExample, following_positions, joined_pixels
    from terrace.models.batch import to_device
    from terrace.models.shared_prompt import Unit
    from terrace.objectives.reward_model import PairBatch, answer_rows

    ids, positions, units, start = [], [], [], 0
    for group in groups:
        prompt, length = group.prompt, len(group.prompt.input_ids)
        ids.append(prompt.input_ids)
        positions.append(prompt.positions)
        for answer in group.answers:
            ids.append(np.asarray(answer, np.int32))
            positions.append(following_positions(prompt.positions, len(answer)))
        units.append(Unit(start, length, tuple(len(answer) for answer in group.answers)))
        start = units[-1].end
    example = PackedExample(
        pack=0,
        input_ids=np.concatenate(ids).astype(np.int32),
        targets=np.full(start, -100, np.int32),
        position_ids=np.concatenate(positions, axis=1).astype(np.int32),
        segment_ends=np.asarray([unit.end for unit in units], np.int32),
        **joined_pixels([group.prompt for group in groups]),
        sample_ids=[""] * len(units),
        sources=[""] * len(units),
        kinds=["prompt"] * len(units),
        sequence_length=start,
    )
    return PairBatch(to_device(example, device, torch.float32), units, torch.tensor(answer_rows(units), device=device))


@lru_cache(maxsize=2)
def _opened(path: str, device: str) -> _Judge:
    """The model with shared-prompt attention, its tokenizer and image bounds, loaded once per process."""
    import torch

    from terrace.data.family import directory_family
    from terrace.data.tokenizer import load_tokenizer
    from terrace.models.build import build_model, model_config
    from terrace.models.shared_prompt import use_shared_prompt_attention
    from terrace.recipe.schema import Model

    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"reward_model: {path} is no Hugging Face directory; name the final/ of a reward_model stage")
    tokenizer = load_tokenizer(path)
    model = Model(architecture=json.loads((folder / "config.json").read_text())["model_type"], pretrained=path)
    built = build_model(model, model_config(model, tokenizer), device, torch.float32).eval()
    use_shared_prompt_attention(built, "sdpa_segments")
    family = tokenizer.fit(directory_family(path))
    preprocessing = json.loads((folder / "preprocessor_config.json").read_text())
    return _Judge(built, tokenizer, family, family.exported_pixels(preprocessing))
