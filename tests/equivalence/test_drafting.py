"""Decoding with drafts of heads: the same tokens as without, and drafts that are what the heads say in training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoding import PROMPTS
from families import case_of, conversation
from packs import IMAGE_PAD, VIDEO_PAD, tiny_model, tiny_recipe
from ranks import memory_feed

from terrace.data.prompt import read_prompt
from terrace.generation.drafting import DraftingEngine
from terrace.generation.interface import Prompt, Response, Sampling
from terrace.generation.native import NativeEngine
from terrace.generation.tokens import forbidden_tokens
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import materialise, meta_model, model_config
from terrace.models.forward import pack_hidden
from terrace.models.heads import attach_heads, source_with_heads
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.models.weights import initial_weights
from terrace.objectives.interface import Opening
from terrace.objectives.medusa import Medusa
from terrace.objectives.mtp import Mtp
from terrace.recipe.schema import Model
from terrace.rl.units import TrainGroup, unit_pack
from terrace.worker.context import WorkerContext

FORBIDDEN, STOP = (IMAGE_PAD, VIDEO_PAD), tuple(range(0, 512, 17))


def model_with(kind: str) -> Any:
    """Larger weights, so that distributions are far from uniform."""
    torch.set_num_threads(1)
    section = Model.model_validate(tiny_model())
    skeleton = meta_model(model_config(section))
    source, _ = initial_weights(section, skeleton, None)
    attach_heads(skeleton, kind, 2)
    model = materialise(skeleton, source_with_heads(skeleton, source, None, 0), "cpu").requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    use_shared_prompt_attention(model, "sdpa_segments")
    return model


@pytest.mark.parametrize("kind", ["mtp", "medusa"])
def test_drafts_change_no_token(kind):
    model = model_with(kind)
    how = [Sampling(2, 24, 0.0), Sampling(4, 24, 0.7, seed=3), Sampling(5, 17, 1.0, top_p=0.6, seed=9), Sampling(3, 1, 1.0)]
    stops = [(), STOP, STOP, STOP]
    for sampling, stop in zip(how, stops):
        plain = NativeEngine(model, FORBIDDEN, stop, "cpu", "fp32")
        drafting = DraftingEngine(model, FORBIDDEN, stop, "cpu", "fp32")
        heard: dict[tuple[int, int], list[int]] = {}
        expected = plain.generate(PROMPTS, sampling)
        found = drafting.generate(PROMPTS, sampling, heard=lambda place, n, new, told=heard: told.setdefault((place, n), []).extend(new))
        for place, (group, other) in enumerate(zip(found, expected)):
            for number, (response, wanted) in enumerate(zip(group, other)):
                assert response.tokens.tolist() == wanted.tokens.tolist()
                assert response.finished == wanted.finished
                assert heard[place, number] == wanted.tokens.tolist()
                np.testing.assert_allclose(response.logprobs, wanted.logprobs, atol=1e-4)
        if sampling.max_tokens > 1:
            assert drafting.drafted > 0
            assert drafting.acceptance is not None
    assert DraftingEngine(model, FORBIDDEN, (), "cpu", "fp32").acceptance is None


@pytest.mark.parametrize("kind", ["mtp", pytest.param("medusa", marks=pytest.mark.slow)])
def test_drafts_are_what_the_heads_say_in_training(kind, monkeypatch):
    """Every draft of a greedy decoding is the choice of the training forward on prompt and response."""
    model = model_with(kind)
    engine = DraftingEngine(model, FORBIDDEN, (), "cpu", "fp32")
    made: list[tuple[int, list[int]]] = []  # tokens before the drafts, the drafts
    plain = DraftingEngine._drafts
    lengths: list[int] = []

    def noted(self: Any, *arguments: Any) -> torch.Tensor:
        drafts = plain(self, *arguments)
        made.append((lengths[-1], drafts[0].tolist()))
        return drafts

    recorded = DraftingEngine._record

    def counted(self: Any, *arguments: Any) -> Any:
        result = recorded(self, *arguments)
        lengths.append(int(result[0][0]))
        return result

    monkeypatch.setattr(DraftingEngine, "_drafts", noted)
    monkeypatch.setattr(DraftingEngine, "_record", counted)
    prompt = PROMPTS[2]
    [[response]] = engine.generate([prompt], Sampling(1, 40, 0.0))
    whole = Response(np.append(response.tokens, 0).astype(np.int32), response.logprobs, True)
    example, _ = unit_pack([TrainGroup(prompt, (whole,), (0.0,))])
    targets = np.append(example.input_ids[1:], -100).astype(np.int32)
    example = dataclasses.replace(example, targets=targets)
    use_attention(model, "sdpa_segments")
    recipe, context = tiny_recipe(objective=kind, train={"heads": {"lr": 1e-3}}, mtp={"depth": 2} if kind == "mtp" else None,
                                  medusa={"heads": 2} if kind == "medusa" else None), WorkerContext()  # fmt: skip
    opening = Opening(recipe, recipe.stages[0], memory_feed(tiny_recipe(), 0, context), context, Path())
    objective = {"mtp": Mtp, "medusa": Medusa}[kind](opening)
    batch = to_device(example, "cpu", torch.float32)
    chosen = []
    for what, rows, layer in objective.outputs(model, batch, pack_hidden(model, batch)):
        logits = layer(rows).index_fill(1, torch.tensor(FORBIDDEN), float("-inf"))
        chosen.append(dict(zip(what.rows.tolist(), logits.argmax(dim=1).tolist())))
    length = len(prompt.input_ids)
    compared = 0
    for count, drafts in made:
        for head, draft in enumerate(drafts):
            row = length + count - 2  # whose hidden state the newest of `count` tokens was sampled from
            if row in chosen[head]:
                assert draft == chosen[head][row]
                compared += 1
    assert compared > 15
    assert engine.drafted >= compared


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "kimi_k25", "qwen3_vl"])
def test_drafts_change_no_token_of_a_family(name, tmp_path_factory):
    """A window of attention, keys and values of different widths, features added further up."""
    torch.set_num_threads(1)
    case = case_of(name, tmp_path_factory.getbasetemp() / "tokenizers")
    prompts = []
    for number, sizes in enumerate(([(90, 60)], [], [(60, 120)])):
        one = conversation(number, sizes)
        read = read_prompt(one.sample, one.images, one.sizes, case.tokenizer, case.family, case.pixels)
        prompts.append(Prompt(**vars(read.inputs), key=("s", number), id=str(number)))
    for kind in ("mtp", "medusa"):
        skeleton = meta_model(case.config)
        source, _ = initial_weights(case.section, skeleton, None)
        attach_heads(skeleton, kind, 2)
        model = materialise(skeleton, source_with_heads(skeleton, source, None, 0), "cpu").requires_grad_(False).eval()
        use_shared_prompt_attention(model, "sdpa_segments")
        never = forbidden_tokens(case.tokenizer, case.config)
        for sampling in (Sampling(2, 12, 0.0), Sampling(3, 12, 1.0, seed=2)):
            engines = [one(model, never, (), "cpu", "fp32") for one in (NativeEngine, DraftingEngine)]
            plain, drafted = ([[answer.tokens.tolist() for answer in group] for group in engine.generate(prompts, sampling)]
                              for engine in engines)  # fmt: skip
            assert drafted == plain
