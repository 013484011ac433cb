"""LaVIN's adapters: the tower and the language model written out as published, packs, answers, counts, an export."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from adapted import MODALITY, adapted_case, adapted_config
from families import Case, conversation, model_of, pack_of
from torch.nn.functional import layer_norm, silu
from transformers import AutoModelForImageTextToText

from terrace.data.prompt import read_prompt
from terrace.generation.interface import Prompt, Sampling
from terrace.generation.native import NativeEngine
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model
from terrace.models.export import export_hf
from terrace.models.families.registry import family_of_model
from terrace.models.forward import pack_hidden
from terrace.models.parts import part_parameters
from terrace.models.shared_prompt import use_shared_prompt_attention
from terrace.objectives.lm import summed_loss
from terrace.planner.parameters import parameter_counts, part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.errors import RecipeError
from terrace.recipe.loading import parse_recipe
from terrace.train.setup import checkpoint_activations

CONFIG = adapted_config("modality_adapters")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    torch.set_num_threads(1)
    return adapted_case("modality_adapters", tmp_path_factory.mktemp("tokenizers"))


def mixed(adapter, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """x [T, W] with the two ways out of the bottleneck, mixed by the softmax over what the router says of one vector."""
    share = ((adapter.router.weight @ read + adapter.router.bias) / MODALITY["temperature"]).softmax(-1)
    narrow = x @ adapter.down.weight.T + adapter.down.bias
    out = x
    for way in range(2):
        halves = [narrow[:, 2 * group : 2 * group + 2] @ adapter.up[way, group].T for group in range(2)]
        out = out + share[way] * (torch.cat(halves, dim=1) + adapter.up_bias[way])
    return out


def class_tokens(tower, pixels: torch.Tensor) -> torch.Tensor:
    """One square -> the class token behind every second block, each block's attention reading adapted vectors."""
    config = tower.config
    x, found = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0], []
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for number, block in enumerate(tower.encoder.layers, 1):
        read = layer_norm(x, x.shape[-1:], block.layer_norm1.weight, block.layer_norm1.bias, config.layer_norm_eps)
        read, own = mixed(block.adapter, read, read[0]), block.self_attn
        q, k, v = ((read @ one.weight.T + one.bias).view(-1, heads, size) for one in (own.q_proj, own.k_proj, own.v_proj))
        scores = (torch.einsum("qhd,khd->hqk", q, k) / size**0.5).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ own.out_proj.weight.T + own.out_proj.bias
        read = layer_norm(x, x.shape[-1:], block.layer_norm2.weight, block.layer_norm2.bias, config.layer_norm_eps)
        inner = read @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        x = x + (inner * torch.sigmoid(1.702 * inner)) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        found += [x[0]] if number % 2 == 0 else []
    return torch.stack(found)


def language(model, embeddings: torch.Tensor, kind: int) -> torch.Tensor:
    """Qwen2's decoder over [modality vector | tokens], as published: tokens do not see the vector, every layer's router reads it."""
    text, decoder = model.config.text_config, model.model.language_model
    hidden = torch.cat([decoder.adapter_kinds.weight[kind : kind + 1], embeddings])
    length, size = len(hidden), text.hidden_size // text.num_attention_heads
    angles = torch.arange(length)[:, None] / 10000.0 ** (torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([angle, angle], dim=-1)[:, None] for angle in (angles.cos(), angles.sin()))
    seen = torch.ones(length, length).tril().bool()
    seen[1:, 0] = False

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + text.rms_norm_eps).sqrt() * weight

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    for layer in decoder.layers:
        read, own = norm(hidden, layer.input_layernorm.weight), layer.self_attn
        read = mixed(layer.adapter, read, read[0])
        q, k, v = ((read @ one.weight.T + one.bias).view(length, -1, size) for one in (own.q_proj, own.k_proj, own.v_proj))
        q, k = turned(q), turned(k)
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
        scores = (torch.einsum("qhd,khd->hqk", q, k) / size**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        hidden = hidden + torch.einsum("hqk,khd->qhd", scores, v).flatten(1) @ own.o_proj.weight.T
        read, mlp = norm(hidden, layer.post_attention_layernorm.weight), layer.mlp
        hidden = hidden + (silu(read @ mlp.gate_proj.weight.T) * (read @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return norm(hidden, decoder.norm.weight)[1:]


def test_the_model_is_the_published_one_packed_and_alone(case, tmp_path):
    """Written out with the modality's vector in the sequence; a pack of both kinds; the class's own forward; an export."""
    model = model_of(case)
    family, inner = family_of_model(model), model.model
    use_attention(model, "sdpa_segments")
    samples = [conversation(1, [(90, 60)]), conversation(2, []), conversation(3, [(40, 130), (50, 50)])]
    examples = [pack_of(case, [sample]) for sample in samples]
    with torch.no_grad():
        alone = [pack_hidden(model, to_device(example, "cpu", torch.float32)) for example in examples]
        packed = pack_hidden(model, to_device(pack_of(case, samples), "cpu", torch.float32))
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
        for example, found in zip(examples, alone):
            ids = torch.from_numpy(example.input_ids.astype(np.int64))
            embeddings = inner.language_model.embed_tokens(ids)
            pictures = len(example.image_rows)
            if pictures:
                pixels = family.normalised(torch.from_numpy(example.pixels), torch.float32).view(-1, 3, 56, 56)
                taken = torch.stack([class_tokens(inner.vision_tower, one) for one in pixels])
                assert taken.shape[1] == 2  # of five blocks, behind the second and the fourth
                low, high = inner.multi_modal_projector.down_proj, inner.multi_modal_projector.up_proj
                embeddings[ids == case.config.image_token_id] = high(silu(low(taken))).flatten(0, 1)
            torch.testing.assert_close(found, language(model, embeddings, int(pictures > 0)), rtol=1e-4, atol=1e-4)
            other = language(model, embeddings, int(pictures == 0))
            assert float((other - found).abs().max()) > 0.05  # the kind matters
        use_attention(model, "sdpa")
        logits = model(input_ids=ids[None], pixel_values=pixels).logits[0]
        torch.testing.assert_close(logits, model.lm_head(alone[2]), rtol=1e-4, atol=1e-4)
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        final = export_hf(state, case.config, None, tmp_path / "final", pixels=case.pixels)
        loaded = AutoModelForImageTextToText.from_pretrained(final, dtype=torch.float32).eval()
        torch.testing.assert_close(loaded(input_ids=ids[None], pixel_values=pixels).logits[0], logits, rtol=1e-5, atol=1e-5)


def test_answers_know_the_kind_of_their_prompt(case):
    """The rollout engine over prompts with and without pictures, against the class's own decoding, which keeps the kind of its rows."""
    model = model_of(case)
    reference = AutoModelForImageTextToText.from_config(case.config, dtype=torch.float32, attn_implementation="sdpa").eval()
    reference.load_state_dict(model.state_dict())
    use_shared_prompt_attention(model, "sdpa_segments")
    prompts = []
    for number, sizes in enumerate(([(90, 60)], [], [(60, 120), (100, 100)])):
        loaded = conversation(number, sizes)
        read = read_prompt(loaded.sample, loaded.images, loaded.sizes, case.tokenizer, case.family, case.pixels)
        prompts.append(Prompt(**vars(read.inputs), key=("s", number), id=str(number)))
    engine = NativeEngine(model, (0,), (1,), "cpu", "fp32", max_rows=4)
    groups = engine.generate(prompts, Sampling(samples=2, max_tokens=6, temperature=0.0))
    family = family_of_model(model)
    for prompt, group in zip(prompts, groups):
        ids = torch.from_numpy(prompt.input_ids.astype(np.int64))[None]
        pixels = {}
        if len(prompt.image_rows):
            pixels["pixel_values"] = family.normalised(torch.from_numpy(prompt.pixels), torch.float32).view(-1, 3, 56, 56)
        told = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [0], "eos_token_id": [1], "pad_token_id": 1}
        out = reference.generate(input_ids=ids, **pixels, attention_mask=torch.ones_like(ids), **told)
        assert all(response.tokens.tolist() == out[0, ids.shape[1] :].tolist() for response in group)


def test_gradients_reach_every_adapter_and_recomputing_changes_nothing(case):
    """Text alone and with pictures; and the same gradients where blocks are computed again in backward."""
    for sizes in ([(90, 60)], []):
        gradients = []
        for again in (False, True):
            model = model_of(case).train()
            use_attention(model, "sdpa_segments")
            if again:
                [stage] = recipe_of(CONFIG, activation_checkpointing=True).stages
                checkpoint_activations(model, stage)
            batch = to_device(pack_of(case, [conversation(3, sizes), conversation(4, [])]), "cpu", torch.float32)
            summed_loss(model, batch, 64).backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        first, second = gradients
        unused = set(family_of_model(model).unused(case.config, list(first)))
        assert {name for name, gradient in first.items() if gradient is None} == unused
        assert all(torch.equal(first[name], second[name]) for name in first if name not in unused)
        kinds = first["model.language_model.adapter_kinds.weight"]
        assert bool(kinds[0].any())
        assert bool(kinds[1].any()) == bool(sizes)


def test_adapters_begin_at_nothing_and_are_counted(case, tmp_path):
    model = build_model(case.section, case.config)
    plain_case = adapted_case("modality_adapters", tmp_path, modality_adapters=None)
    plain = build_model(plain_case.section, plain_case.config)
    shape = shape_of_config(case.config.to_dict(), "terrace_vlm")
    parts = part_parameters(model)
    assert parameter_counts(shape) == {part: sum(p.numel() for _, p in pairs) for part, pairs in parts.items()}
    for part in ("vision", "language"):
        blocks = family_of_model(model).blocks_of(model, part)
        assert part_sizes(shape)[part].block == sum(p.numel() for p in blocks[0].parameters())
    named = dict(model.named_parameters())
    unused = family_of_model(model).unused(case.config, list(named))
    idle = sum(named[name].numel() for name in unused)
    assert idle == part_sizes(shape)["vision"].unused > 0  # the fifth block
    use_attention(model, "sdpa_segments")
    use_attention(plain, "sdpa_segments")
    for sizes in ([(90, 60)], []):
        batch = to_device(pack_of(case, [conversation(3, sizes)]), "cpu", torch.float32)
        torch.testing.assert_close(summed_loss(model, batch, 64), summed_loss(plain, batch, 64), rtol=1e-6, atol=1e-6)


def recipe_of(config, sequence_parallel=1, **training):
    return parse_recipe({
        "name": "r", "model": {"architecture": "terrace_vlm", "config": config}, "tokenizer": {"train_vocabulary_size": 400},
        "data": {"sources": {"a": {"uri": "x"}}},
        "stages": [{"name": "s", "train": {part: {"lr": 1e-3, **training} for part in ("vision", "language")}, "mixture": {"a": 1.0},
                    "budget": {"steps": 1}, "parallel": {"sequence_parallel": sequence_parallel}, "resources": {"workers": 2},
                    "precision": "fp32"}],
    }, "r")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modality_adapters": MODALITY | {"rank": 3}}, "2 does not divide rank"),
        ({"modality_adapters": MODALITY | {"temperature": 0}}, "modality_adapters.temperature: must be a number above 0, not 0"),
        ({"visual_expert": True}, "modality_adapters: and visual_expert do not go together"),
        ({"connector": {"kind": "class_tokens", "every": 9}}, "class_tokens needs a clip_vision_model of 9 blocks or more"),
        ({"connector": {"kind": "mlp", "every": 2}}, "connector.every: is an option of class_tokens, not of mlp"),
    ],
)
def test_mistakes_are_named(changes, told):
    with pytest.raises(RecipeError, match=re.escape(told)):
        recipe_of(CONFIG | changes)


def test_ranks_do_not_share_a_pack():
    with pytest.raises(RecipeError, match="its modality_adapters ask for a token's whole sample"):
        recipe_of(CONFIG, sequence_parallel=2)
    assert recipe_of({name: value for name, value in CONFIG.items() if name != "modality_adapters"}, sequence_parallel=2)


def test_a_speaker_keeps_the_kind_of_what_it_answers(case, tmp_path):
    """A final directory that answers token by token with a cache, against logits of the whole."""
    from single_answers import answer, load_speaker

    model = model_of(case)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    final = export_hf(state, case.config, case.tokenizer.directory, tmp_path / "final", pixels=case.pixels)
    speaker = load_speaker(final)
    for sizes in ([(90, 60)], []):
        sample = conversation(1, sizes)
        said = answer(speaker, sample.sample, sample.images, max_new_tokens=4)
        read = read_prompt(sample.sample, sample.images, sample.sizes, case.tokenizer, case.family, case.pixels).inputs
        ids = torch.from_numpy(np.concatenate([read.input_ids, said.token_ids]).astype(np.int64))[None]
        pixels = family_of_model(model).normalised(torch.from_numpy(read.pixels), torch.float32).view(-1, 3, 56, 56) if sizes else None
        use_attention(model, "sdpa")
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels).logits[0, len(read.input_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(said.token_ids)[:, None])[:, 0]
        never = [token for token in range(logits.shape[1]) if token in speaker_never(speaker)]
        logits[:, never] = -torch.inf
        torch.testing.assert_close(chosen, logits.max(dim=1).values)


def speaker_never(speaker) -> set[int]:
    from terrace.generation.engines import forbidden_tokens

    return set(forbidden_tokens(speaker.tokenizer, speaker.model.config))
