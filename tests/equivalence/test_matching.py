"""BLIP-2's first stage: value and gradients are the formulas, on transformers' own passes, for any packs, ranks and strategy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_ranks
from towers import assert_equal, gradients_of_step, gradients_of_steps, pair_pack, towers_model, towers_recipe, train_towers
from transformers import Blip2ForImageTextRetrieval

from terrace.errors import Preempted
from terrace.models.batch import image_facts
from terrace.models.families.registry import family_of_model
from terrace.objectives.chance import generator_of
from terrace.objectives.matching_keys import UNUSED, Keys
from terrace.objectives.matching_losses import contrast_with_keys, drawn_negatives
from terrace.objectives.retrieval import recalls, recalls_of_scores
from terrace.planner.parameters import parameter_counts
from terrace.planner.shapes import shape_of_config
from terrace.recipe.rules import check
from terrace.worker.context import WorkerContext

NAME, PAIRS, SMOOTHING, SEED = "blip_2_matching", 6, 0.1, 0
PARTS = {"vision": {"lr": 1e-3}, "projector": {"lr": 1e-3}}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def attended(block, hidden, keys, mask):
    """One attention and its residual, of two heads: what transformers' module computes."""
    inner, heads = block.attention, block.attention.num_attention_heads

    def split(values):
        return values.view(*values.shape[:-1], heads, -1).transpose(1, 2)

    query, key, value = split(inner.query(hidden)), split(inner.key(keys)), split(inner.value(keys))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    found = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    return block.output(found.transpose(1, 2).flatten(2), hidden)


def written(model, seen, ids):
    """Logits [1, L, words] of one text as published: the picture's queries first, layer by layer, then text over what they leave."""
    queries = model.qformer.layernorm(model.query_tokens)
    text = model.qformer.layernorm(model.embeddings(input_ids=ids))
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for layer in model.qformer.encoder.layer:
        everything = torch.cat([queries, text], dim=1)
        sees = torch.cat([torch.ones(length, queries.shape[1], dtype=torch.bool), causal], dim=1)
        text_now = attended(layer.attention, text, everything, sees)
        now = attended(layer.attention, queries, queries, torch.ones(1, 1, dtype=torch.bool))
        if layer.has_cross_attention:
            now = attended(layer.crossattention, now, seen, torch.ones(1, 1, dtype=torch.bool))
        queries, text = layer.feed_forward_chunk_query(now), layer.feed_forward_chunk(text_now)
    hidden = model.text_head.norm(F.gelu(model.text_head.dense(text)))
    return hidden @ model.embeddings.word_embeddings.weight.T + model.text_head.bias


def smoothed(logits, target):
    return F.cross_entropy(logits, target, label_smoothing=SMOOTHING)


def contrast_of_keys(images, texts, key_images, key_texts, temperature, weight):
    """BLIP's contrast, and its similarities to the keys both ways."""

    def nearest(pictures, words):
        return torch.einsum("nqd,md->nmq", pictures, words).amax(-1) / temperature

    pairs, loss, found = len(images), 0.0, []
    for scores, taught in (
        (nearest(images, key_texts), nearest(key_images[:pairs], key_texts)),
        (nearest(key_images, texts).T, nearest(key_images, key_texts[:pairs]).T),
    ):
        target = (1 - weight) * torch.eye(pairs, len(key_texts), dtype=scores.dtype) + weight * taught.detach().softmax(1)
        loss = loss - 0.5 * (target * scores.log_softmax(1)).sum(1).mean()
        found.append(scores[:, :pairs])
    return loss, *found


def published_step(dtype, keys=None):
    """The loss and its gradients over all pairs at once, with transformers' own forward for contrast and matching. `keys` is the queue
    of a key encoder that is still the model itself, and its share of the target."""
    model, config = towers_model(NAME, dtype)
    family, pack = family_of_model(model), pair_pack(config, 0, PAIRS)
    texts = np.split(pack.input_ids.astype(np.int64), pack.segment_ends[:-1])
    pixels = family.inputs(family.normalised(torch.from_numpy(pack.pixels), dtype), image_facts(pack))["pixel_values"]
    queries = config.num_query_tokens

    def rows(chosen):
        length = max(len(text) for text in chosen)
        ids, mask = torch.full((len(chosen), queries + length), 1), torch.zeros(len(chosen), queries + length, dtype=torch.int64)
        mask[:, :queries] = 1
        for row, text in enumerate(chosen):
            ids[row, queries : queries + len(text)], mask[row, queries : queries + len(text)] = torch.from_numpy(text), 1
        return {"input_ids": ids, "attention_mask": mask}

    found = model(pixel_values=pixels, **rows(texts))
    to_texts, labels = found.logits_per_image / model.temperature, torch.arange(PAIRS)
    to_pictures = to_texts.T
    contrast = 0.5 * (smoothed(to_texts, labels) + smoothed(to_pictures, labels))
    if keys is not None:
        (queue_images, queue_texts), weight = keys
        key_images, key_texts = torch.cat([found.image_embeds.detach(), queue_images]), torch.cat([found.text_embeds.detach(), queue_texts])
        vectors = (found.image_embeds, found.text_embeds, key_images, key_texts)
        contrast, to_texts, to_pictures = contrast_of_keys(*vectors, model.temperature, weight)
    negatives = []
    for matrix, purpose in ((to_texts, "negative text"), (to_pictures, "negative picture")):
        for pair in range(PAIRS):
            weights = matrix[pair].detach().double().softmax(0).numpy().copy()
            weights[pair] = 0.0
            draw = generator_of(SEED, "pairs", f"p{pair}", 0, purpose).random()
            negatives.append(int(np.nonzero(weights.cumsum() > draw * weights.sum())[0][0]))
    chosen_texts, chosen_pictures = negatives[:PAIRS], negatives[PAIRS:]
    logits = torch.cat([
        model(pixel_values=which, **rows(words), use_image_text_matching_head=True).logits_per_image
        for which, words in ((pixels, texts), (pixels, [texts[n] for n in chosen_texts]), (pixels[chosen_pictures], texts))
    ])  # fmt: skip
    matching = F.cross_entropy(logits, torch.tensor([1] * PAIRS + [0] * 2 * PAIRS))
    tokens, targets = [], []
    for pair, text in enumerate(texts):
        seen = model.vision_model(pixel_values=pixels[pair : pair + 1]).last_hidden_state
        ids = torch.from_numpy(text)[None].clone()
        ids[0, 0] = config.image_token_index
        tokens.append(written(model, seen, ids)[0, :-1])
        targets.append(torch.from_numpy(text)[1:])
    loss = contrast + matching + smoothed(torch.cat(tokens), torch.cat(targets))
    loss.backward()
    return float(loss.detach()), {key: np.zeros(1) if p.grad is None else p.grad.numpy() for key, p in model.named_parameters()}


def test_value_and_gradients_are_the_formulas_whatever_the_packs():
    exact = published_step(torch.float64)
    assert {key for key, gradient in exact[1].items() if not np.abs(gradient).max()} <= {"vision_model.embeddings.patch_embedding.bias"}
    for sizes in ([6], [2, 2, 2], [1, 5, 0]):
        assert_equal(gradients_of_step(0, 1, NAME, "matching", sizes), exact, 1e-10)
    assert_equal(gradients_of_step(0, 1, NAME, "matching", [3, 3], "float32"), published_step(torch.float32), 3e-6)


KEYS = {"momentum": 0.9, "queue": 5, "distillation": 0.4}


def first_queue():
    recipe = towers_recipe(NAME, "matching", matching=KEYS)
    _, config = towers_model(NAME)
    opening = SimpleNamespace(feed=SimpleNamespace(config=config), stage=recipe.stages[0], context=WorkerContext())
    return tuple(Keys(recipe.stages[0].matching, opening).queue.values())


def test_a_key_encoder_and_its_queue_stand_on_the_other_side_of_the_contrast():
    rng = np.random.default_rng(5)

    def vectors(*shape):
        return F.normalize(torch.from_numpy(rng.normal(size=shape)), dim=-1)

    images, texts, keys = vectors(6, 3, 8), vectors(6, 8), (vectors(11, 3, 8), vectors(11, 8))
    leaves = [images.clone().requires_grad_(), texts.clone().requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)]
    wanted, to_texts, to_pictures = contrast_of_keys(leaves[0], leaves[1], *keys, leaves[2], 0.4)
    slopes = torch.autograd.grad(wanted, leaves)
    loss, of_temperature = 0.0, 0.0
    for own in (slice(0, 2), slice(2, 6)):
        share, texts_now, pictures_now = contrast_with_keys(images, texts, keys, leaves[2].detach(), 0.4, own)
        loss, of_temperature = loss + share.loss.sum() / 6, of_temperature + share.temperature.sum() / 6
        torch.testing.assert_close(share.images / 6, slopes[0][own])
        torch.testing.assert_close(share.texts / 6, slopes[1][own])
    torch.testing.assert_close((loss, of_temperature), (wanted.detach(), slopes[2]))
    torch.testing.assert_close((texts_now, pictures_now), (to_texts.detach(), to_pictures.detach()))
    exact = published_step(torch.float32, (first_queue(), 0.4))
    for sizes in ([6], [1, 5, 0]):
        assert_equal(gradients_of_step(0, 1, NAME, "matching", sizes, "float32", matching=KEYS), exact, 3e-6)


@pytest.mark.slow
def test_the_queue_holds_the_latest_pairs_and_all_of_it_resumes(tmp_path):
    recipe = towers_recipe(NAME, "matching", matching=KEYS | {"queue": 20}, train=PARTS, checkpoint={"every_steps": 1})
    values = {"one": recipe.model_dump(mode="json")}
    train_towers(0, 1, values, str(tmp_path / "whole"))
    with pytest.raises(Preempted):
        train_towers(0, 1, values, str(tmp_path / "again"), stop_after=2)
    train_towers(0, 1, values, str(tmp_path / "again"))
    assert weights_of(tmp_path / "again" / "one") == weights_of(tmp_path / "whole" / "one")
    plain = {"one": towers_recipe(NAME, "matching", train=PARTS).model_dump(mode="json")}
    train_towers(0, 1, plain, str(tmp_path / "plain"))
    assert weights_of(tmp_path / "plain" / "one") != weights_of(tmp_path / "whole" / "one")
    # What enters the queue: the batch's keys, the oldest leave; the encoder moves by a tenth.
    _, config = towers_model(NAME)
    opening = SimpleNamespace(feed=SimpleNamespace(config=config), stage=recipe.stages[0], context=WorkerContext())
    keys = Keys(recipe.stages[0].matching, opening)
    first, _ = towers_model(NAME)
    encoder = keys.encoder(lambda: ((name, one.detach()) for name, one in first.named_parameters()))
    before = {name: rows.clone() for name, rows in keys.queue.items()}
    new = torch.ones(3, 4, 16), 2 * torch.ones(3, 16)
    keys.remember(*new, ((name, one.detach() + 1.0) for name, one in first.named_parameters()))
    assert torch.equal(keys.queue["images"], torch.cat([before["images"][3:], new[0]]))
    assert torch.equal(keys.queue["texts"], torch.cat([before["texts"][3:], new[1]]))
    start = dict(first.named_parameters())
    assert set(start) - set(encoder.tensors) == {name for name in start if name.startswith(UNUSED)}
    for name, tensor in encoder.tensors.items():
        torch.testing.assert_close(tensor, start[name].detach() + 0.1)


def test_what_needs_a_key_encoder_is_named():
    recipe = towers_recipe(NAME, "matching", train=PARTS, matching={"queue": 4, "distillation": 0.4})
    told = "\n".join(str(problem) for problem in check(recipe))
    assert "queue" in told
    assert "distillation" in told
    assert check(towers_recipe(NAME, "matching", train=PARTS, matching=KEYS)) == []


@pytest.mark.slow
def test_another_number_of_ranks_takes_the_queue_over(tmp_path):
    layout = {"resources": {"workers": [1, 2]}, "checkpoint": {"every_steps": 1}}
    recipe = towers_recipe(NAME, "matching", train=PARTS, matching=KEYS | {"queue": 20}, **layout)
    values = {"one": recipe.model_dump(mode="json")}
    train_towers(0, 1, values, str(tmp_path / "single"))
    with pytest.raises(Preempted):
        train_towers(0, 1, values, str(tmp_path / "changed"), stop_after=2)
    run_ranks(2, train_towers, values, str(tmp_path / "changed"))
    np.testing.assert_allclose(losses_of(tmp_path / "changed"), losses_of(tmp_path / "single"), rtol=1e-5)
    [found, *_] = run_ranks(2, gradients_of_keys, [[3, 3], [4, 2, 0, 0]])
    exact = published_step(torch.float32, (first_queue(), 0.4))
    for result in found:
        assert_equal(result, exact, 3e-6)


def gradients_of_keys(rank, world_size, layouts):
    return [gradients_of_step(rank, world_size, NAME, "matching", sizes, "float32", matching=KEYS) for sizes in layouts]


def losses_of(folder: Path, name: str = "one") -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_number_of_ranks_changes_nothing(ranks):
    """Also where a rank has fewer pairs than others, or none."""
    layouts = {2: ([3, 3], [4, 2, 0, 0]), 4: ([2, 2, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0])}[ranks]
    [found, *_] = run_ranks(ranks, gradients_of_steps, [(NAME, "matching", sizes) for sizes in layouts])
    exact = published_step(torch.float64)
    for result in found:
        assert_equal(result, exact, 1e-10)


def test_negatives_are_other_texts_and_the_same_whatever_the_layout():
    rng = np.random.default_rng(0)
    logits, draws = torch.from_numpy(rng.normal(size=(7, 7))), rng.random((7, 2))
    which = np.array([0, 1, 2, 0, 3, 4, 5])
    same = which[:, None] == which[None]
    found = drawn_negatives(logits, logits.T, same, np.arange(7), draws)
    assert all(which[text] != which[pair] and which[picture] != which[pair] for pair, (text, picture) in enumerate(zip(*found)))
    dealt = rng.permutation(7)  # the pairs as other ranks hold them
    order = np.argsort(dealt)
    again = drawn_negatives(logits[np.ix_(dealt, dealt)], logits.T[np.ix_(dealt, dealt)], same[np.ix_(dealt, dealt)], order, draws[dealt])
    assert all(np.array_equal(dealt[one], other[dealt]) for one, other in zip(again, found))
    alone = drawn_negatives(torch.zeros(2, 2), torch.zeros(2, 2), np.ones((2, 2), bool), np.arange(2), draws[:2])
    assert [side.tolist() for side in alone] == [[-1, -1], [-1, -1]]
    # Drawn as often as the softmax says.
    many = np.linspace(0, 1, 2_000, endpoint=False)
    counts = np.zeros(7)
    for draw in many:
        counts[drawn_negatives(logits, logits.T, same, np.arange(7), np.full((7, 2), draw))[0][1]] += 1
    weights = logits[1].exp().numpy() * ~same[1]
    np.testing.assert_allclose(counts / len(many), weights / weights.sum(), atol=2e-3)


def weights_of(folder: Path) -> str:
    [file] = (folder / "final").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_stage_trains_resumes_to_the_same_bits_and_exports_as_transformers_class(tmp_path):
    recipe = towers_recipe(NAME, "matching", train=PARTS, checkpoint={"every_steps": 1})
    values = {"one": recipe.model_dump(mode="json")}
    train_towers(0, 1, values, str(tmp_path / "whole"))
    with pytest.raises(Preempted):
        train_towers(0, 1, values, str(tmp_path / "again"), stop_after=2)
    train_towers(0, 1, values, str(tmp_path / "again"))
    assert weights_of(tmp_path / "again" / "one") == weights_of(tmp_path / "whole" / "one")
    model, told = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "whole" / "one" / "final", output_loading_info=True)
    assert not told["missing_keys"]
    assert {key.split(".")[0] for key in told["unexpected_keys"]} == {"temperature", "text_head"}
    assert model.config.qformer_config.vocab_size == 400
    sizes = parameter_counts(shape_of_config({**recipe.model.config}, NAME, 400))
    own, _ = towers_model(NAME)
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in own.parameters())
    assert check(recipe) == []
    # A line of the run tells the losses before their weights, and held-out pairs how often the right one is found.
    lines = [json.loads(line) for line in (tmp_path / "whole" / "one" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["loss"] == pytest.approx(line["itc_loss"] + line["itm_loss"] + line["itg_loss"], rel=1e-5)
        assert 0 <= line["match_accuracy"] <= 1


def test_recalls_of_scores_are_those_of_vectors():
    rng = np.random.default_rng(3)
    captions = [number % 23 for number in range(30)]
    images, texts = (torch.from_numpy(rng.normal(size=(30, 8))) for _ in range(2))
    texts = texts[captions]  # equal captions have equal vectors
    assert recalls_of_scores(images @ texts.T, captions) == recalls(images, texts, captions)
    assert set(recalls_of_scores(torch.eye(12), list("abcdefghijkl")).values()) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2), ("ddp", 4)])
def test_strategies_agree_with_one_process(strategy, ranks, tmp_path):
    """Without and with a key encoder and its queue, which are whole on every rank and end as those of one process."""
    kinds = {"plain": {}, "keys": {"matching": KEYS | {"queue": 20}, "checkpoint": {"every_steps": 4}}}
    if strategy == "zero3":
        del kinds["keys"]  # refused
    layout = {"parallel": {"strategy": strategy}, "resources": {"workers": ranks}}
    one, many = (
        {kind: towers_recipe(NAME, "matching", train=PARTS, **options, **more).model_dump(mode="json") for kind, options in kinds.items()}
        for more in ({}, layout)
    )  # fmt: skip
    train_towers(0, 1, one, str(tmp_path / "single"))
    run_ranks(ranks, train_towers, many, str(tmp_path / "many"))
    for kind in kinds:
        np.testing.assert_allclose(losses_of(tmp_path / "many", kind), losses_of(tmp_path / "single", kind), rtol=1e-5, err_msg=kind)
    if "keys" in kinds:
        found, wanted = (state_of(tmp_path / folder / "keys") for folder in ("many", "single"))
        assert set(found) == set(wanted)
        assert any(name.startswith("queue.") for name in wanted)
        assert any(name.startswith("teacher.") for name in wanted)
        for name, tensor in wanted.items():
            # Adam divides by the root of the squares: where a gradient is rounding alone, its step is not
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=5e-4, msg=name)


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """What the objective keeps in the newest checkpoint."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("checkpoints/*/objective*.safetensors"))
    assert files, list(folder.rglob("*"))
    return load_file(files[-1])
