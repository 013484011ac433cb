"""A trained Bradley-Terry model as a reward: `{name: reward_model, options: {path: <stage>/final}}`.

The value is sigmoid(score), in (0, 1). It runs where the router runs (not in the sandbox: no text is evaluated). For
GPUs of its own, serve it: `terrace serve-rewards` on another machine, and `remote` in the recipe. Prompts are judged by
their text; a prompt with images cannot be judged without them and gets None, which is counted as a failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from terrace.errors import InputError
from terrace.rewards.types import RewardItem


def reward_model(
    items: Sequence[RewardItem], *, path: str, device: str = "cpu", items_per_batch: int = 8, max_tokens: int = 8192
) -> list[float | None]:
    """sigmoid(score) of each response to its prompt; None for a prompt with images, or one longer than `max_tokens`."""
    import torch

    from terrace.data.positions import rope_positions
    from terrace.models.batch import to_device
    from terrace.models.shared_prompt import Unit
    from terrace.objectives.reward_model import PairBatch, answer_rows, scores

    model, tokenizer = _opened(path, device)
    encoded: list[tuple[int, list[int]]] = []
    values: list[float | None] = [None] * len(items)
    for place, item in enumerate(items):
        ids = _conversation(item, tokenizer)
        if not item.metadata.get("image_sizes") and len(ids) <= max_tokens:
            encoded.append((place, ids))
    for start in range(0, len(encoded), items_per_batch):
        part = encoded[start : start + items_per_batch]
        units, begin = [], 0
        for _, ids in part:
            units.append(Unit(begin, 1, (len(ids) - 1,)))
            begin += len(ids)
        example = _pack([ids for _, ids in part], rope_positions)
        batch = PairBatch(
            to_device(example, device, torch.float32), units, torch.tensor(answer_rows(units), device=device)
        )
        with torch.no_grad():
            judged = torch.sigmoid(scores(model, batch)).tolist()
        for (place, _), value in zip(part, judged):
            values[place] = value
    return values


def _conversation(item: RewardItem, tokenizer: Any) -> list[int]:
    """The conversation as training writes it, up to the end mark of the response."""
    from terrace.data.template import encode_prompt
    from terrace.data.types import Sample

    sample = Sample("prompt", "prompt", [{"role": "user", "content": [{"type": "text", "text": item.prompt}]}])
    prompt = encode_prompt(sample, [], tokenizer, (784, 784)).input_ids.tolist()
    return [*prompt, *tokenizer.encode(item.response), tokenizer.special.im_end]


def _pack(sequences: list[list[int]], rope_positions: Any) -> Any:
    import numpy as np

    from terrace.data.types import PATCH_VALUES, PackedExample

    lengths = [len(ids) for ids in sequences]
    return PackedExample(
        pack=0,
        input_ids=np.concatenate([np.asarray(ids, np.int32) for ids in sequences]),
        targets=np.full(sum(lengths), -100, np.int32),
        position_ids=np.concatenate([rope_positions(length, []) for length in lengths], axis=1),
        segment_ends=np.cumsum(lengths).astype(np.int32),
        patches=np.zeros((0, PATCH_VALUES), np.uint8),
        image_grids=np.zeros((0, 3), np.int32),
        sample_ids=[""] * len(lengths),
        sources=[""] * len(lengths),
        kinds=["prompt"] * len(lengths),
        sequence_length=sum(lengths),
    )


@lru_cache(maxsize=2)
def _opened(path: str, device: str) -> tuple[Any, Any]:
    """The model with shared-prompt attention, and its tokenizer, loaded once per process."""
    import torch

    from terrace.data.tokenizer import load_tokenizer
    from terrace.models.build import build_model, model_config
    from terrace.models.shared_prompt import use_shared_prompt_attention
    from terrace.recipe.schema import Model

    if not (Path(path) / "config.json").is_file():
        raise InputError(f"reward_model: {path} is no Hugging Face directory; name the final/ of a reward_model stage")
    tokenizer = load_tokenizer(path)
    import json

    kind = json.loads((Path(path) / "config.json").read_text())["model_type"]
    model = Model(architecture=kind, pretrained=path)
    built = build_model(model, model_config(model, tokenizer), device, torch.float32).eval()
    use_shared_prompt_attention(built, "sdpa_segments")
    return built, tokenizer
