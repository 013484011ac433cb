"""A decoder of another make, that engines are compared with: greedy answers of a model directory, one sample at a time, over
transformers' own layers and key-value cache. Prompt and pictures are encoded once, through the template and the pixels of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, DynamicCache
from transformers.utils import logging as transformers_logging

from terrace.data.family import directory_family
from terrace.data.images import image_size
from terrace.data.prompt import read_prompt
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.data.types import Sample
from terrace.evaluate.model_files import model_sight
from terrace.families.configurations import language_config
from terrace.families.interface import Sight
from terrace.generation.tokens import forbidden_tokens, stop_tokens
from terrace.models.batch import image_facts
from terrace.models.build import directory_config
from terrace.models.families.interface import FamilyModel
from terrace.models.families.registry import family_of_model, output_layer


@dataclass(frozen=True)
class Speaker:
    """A loaded model with everything that turns a sample into an answer."""

    model: Any  # transformers' image-text-to-text class, in eval mode
    family: FamilyModel
    tokenizer: TextTokenizer
    sight: Sight  # its family and (min, max) pixels of a resized image, as in the stage that trained the model


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    finished: bool  # the model ended by itself, within the limit


def load_speaker(
    directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, pixels: tuple[int, int] | None = None
) -> Speaker:
    """The model of a Hugging Face directory that a stage wrote (`stages/NN-name/final`).

    `pixels` defaults to what the directory's preprocessor_config.json says.
    """
    sight, tokenizer = Sight(directory_family(directory), pixels) if pixels else model_sight(directory), load_tokenizer(directory)
    sight = Sight(tokenizer.fit(sight.family), sight.pixels)
    assert not sight.family.crosses, "it knows no pictures beside the text: test_families.py compares those with `generate`"
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        how = {"config": directory_config(directory), "dtype": dtype, "attn_implementation": "sdpa"}
        model = AutoModelForImageTextToText.from_pretrained(directory, **how)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    return Speaker(model.to(device).eval(), family_of_model(model), tokenizer, sight)


@torch.inference_mode()
def answer(speaker: Speaker, prompt: Sample, images: Sequence[bytes], max_new_tokens: int = 64) -> Answer:
    """The model's greedy continuation of `prompt` (up to the assistant's last turn, or the beginning of a running text).

    `images` are the encoded files of the sample's images. Marks of pictures, and ids that the tokenizer lacks, are never generated.
    """
    model, tokenizer, family = speaker.model, speaker.tokenizer, speaker.family
    language, device = family.language(model), next(model.parameters()).device
    sizes = [image_size(data) for data in images]
    read = read_prompt(prompt, images, sizes, tokenizer, speaker.sight.family, speaker.sight.pixels).inputs
    input_ids = torch.from_numpy(read.input_ids.astype(np.int64)).to(device)[None]
    embeddings, more = language.embed_tokens(input_ids), {}
    if len(read.image_rows):
        values = family.normalised(torch.from_numpy(read.pixels).to(device), model.dtype)
        features = family.features(model, values, image_facts(read))
        places = family.places(input_ids, model.config)
        embeddings = embeddings.masked_scatter(places.unsqueeze(-1), features.pooled.to(embeddings.dtype))
        more = family.language_inputs(features, places)
    positions = torch.from_numpy(read.positions.astype(np.int64)).to(device)[:, None]  # [P, 1, L]
    following = torch.from_numpy(read.next_positions).to(device).view(-1, 1, 1)
    ends = set(stop_tokens(tokenizer, model.config))
    never = torch.tensor(forbidden_tokens(tokenizer, model.config), device=device)
    cache, token_ids = DynamicCache(config=language_config(model.config)), []
    for _ in range(max_new_tokens):
        hidden = language(
            inputs_embeds=embeddings, position_ids=positions if len(positions) > 1 else positions[0],
            past_key_values=cache, use_cache=True, **more,
        ).last_hidden_state  # fmt: skip
        logits = output_layer(model)(hidden[0, -1]).index_fill(0, never, float("-inf"))
        token = int(logits.argmax())
        if token in ends:
            return Answer(tokenizer.decode(token_ids).strip(), token_ids, True)
        token_ids.append(token)
        embeddings, more = language.embed_tokens(torch.tensor([[token]], device=device)), {}
        positions, following = following, following + 1
    return Answer(tokenizer.decode(token_ids).strip(), token_ids, False)
