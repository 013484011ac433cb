"""Greedy answers of a model directory, one sample at a time, through the same template and patches as training.

A key-value cache over transformers' own layers; prompt and pictures are encoded once. Meant for demos, spot checks and small
evaluations: about 60 ms per short answer of a tiny model on a CPU. Rollouts of an RL stage have their own batched engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.utils import logging as transformers_logging

from terrace.data.images import image_size, load_patches
from terrace.data.template import encode_prompt
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.data.types import PATCH_SIZE, Sample
from terrace.errors import InputError
from terrace.models.batch import normalise_patches


@dataclass(frozen=True)
class Speaker:
    """A loaded model with everything that turns a sample into an answer."""

    model: Any  # transformers' image-text-to-text class, in eval mode
    tokenizer: TextTokenizer
    pixels: tuple[int, int]  # (min, max) pixels of a resized image, as in the stage that trained the model


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    finished: bool  # the model ended by itself, within the limit


def load_speaker(
    directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, pixels: tuple[int, int] | None = None
) -> Speaker:
    """The model of a Hugging Face directory that a stage wrote (`stages/NN-name/final`).

    `pixels` defaults to what the directory's preprocessor_config.json says. Raises InputError when the directory is none.
    """
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; name the `final` directory of a finished stage")
    if pixels is None:
        preprocessing = json.loads((directory / "preprocessor_config.json").read_text())
        pixels = (int(preprocessing["min_pixels"]), int(preprocessing["max_pixels"]))
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return Speaker(model.to(device).eval(), load_tokenizer(directory), pixels)


@torch.inference_mode()
def answer(speaker: Speaker, prompt: Sample, images: Sequence[bytes], max_new_tokens: int = 64) -> Answer:
    """The model's greedy continuation of `prompt` (up to the assistant's last turn, or the beginning of a running text).

    `images` are the encoded files of the sample's images. Marks of pictures are never generated.
    """
    model, tokenizer = speaker.model, speaker.tokenizer
    device = next(model.parameters()).device
    encoded = encode_prompt(prompt, [image_size(data) for data in images], tokenizer, speaker.pixels)
    input_ids = torch.from_numpy(encoded.input_ids.astype(np.int64)).to(device)[None]
    embeddings = model.model.language_model.embed_tokens(input_ids)
    if len(encoded.grids):
        features = _image_features(model, encoded, images, device)
        places = (input_ids == tokenizer.special.image_pad).unsqueeze(-1)
        embeddings = embeddings.masked_scatter(places, features.to(embeddings.dtype))
    positions = torch.from_numpy(encoded.positions.astype(np.int64)).to(device)[:, None]  # [4, 1, L]
    text_position, rope_position = positions.shape[-1], int(positions[1:].max()) + 1
    special = tokenizer.special
    ends = (special.im_end, special.endoftext)
    never = torch.tensor(
        [special.im_start, special.vision_start, special.vision_end, special.image_pad, special.video_pad],
        device=device,
    )
    cache, token_ids = DynamicCache(config=model.config.text_config), []
    for _ in range(max_new_tokens):
        hidden = model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits = model.lm_head(hidden[0, -1]).index_fill(0, never, float("-inf"))
        token = int(logits.argmax())
        if token in ends:
            return Answer(tokenizer.decode(token_ids).strip(), token_ids, True)
        token_ids.append(token)
        embeddings = model.model.language_model.embed_tokens(torch.tensor([[token]], device=device))
        positions = torch.tensor([text_position, *[rope_position] * 3], device=device).view(4, 1, 1)
        text_position, rope_position = text_position + 1, rope_position + 1
    return Answer(tokenizer.decode(token_ids).strip(), token_ids, False)


def _image_features(model: Any, encoded: Any, images: Sequence[bytes], device: torch.device) -> torch.Tensor:
    """Visual tokens [V, hidden] of the prompt's images in token order."""
    patches = []
    for numbers, (_, rows, columns) in zip(encoded.images, encoded.grids):
        if len(numbers) != 1:
            raise InputError("generation from videos is not supported here; ask about images")
        patches.append(load_patches(images[numbers[0]], int(rows) * PATCH_SIZE, int(columns) * PATCH_SIZE))
    values = normalise_patches(torch.from_numpy(np.concatenate(patches)).to(device), model.dtype)
    grids = torch.from_numpy(encoded.grids.astype(np.int64)).to(device)
    return model.model.visual(values, grid_thw=grids).pooler_output
