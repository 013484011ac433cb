"""Masked language modelling: loss and gradients are the classes' own, masks those of sample and epoch; ranks and packs change nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_ranks
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from towers import write_rows
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    RobertaForMaskedLM,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from terrace.curriculum.attempt_worker import run_stage
from terrace.data.prepare import prepare_data
from terrace.data.stream.held_out import held_out_packs
from terrace.data.tokenizer import load_tokenizer, train_tokenizer
from terrace.data.types import PackedExample, no_pixels
from terrace.errors import InputError, Preempted
from terrace.families.registry import family_class
from terrace.models.attention import use_attention
from terrace.models.batch import to_device
from terrace.models.build import build_model, model_config
from terrace.models.families.registry import family_model_named, family_of_model, output_layer
from terrace.models.parts import has_weight_decay, part_parameters
from terrace.models.taken import check_taken
from terrace.models.tensor_files import Directory
from terrace.objectives.masked_tokens import Masking
from terrace.objectives.mlm import asked_rows, right_tokens
from terrace.planner.flops import exact_load, training_flops
from terrace.planner.parameters import parameter_counts, part_sizes
from terrace.planner.shapes import shape_of_config
from terrace.recipe.rules import check
from terrace.recipe.schema import Model, Recipe
from terrace.recipe.schema_mlm import MlmOptions
from terrace.worker.context import WorkerContext

TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 80,
    "initializer_range": 0.2,
}  # fmt: skip
CLASSES = {"bert": BertForMaskedLM, "roberta": RobertaForMaskedLM}
COLOURS = ("red", "green", "blue", "yellow", "purple")


def text_of(number: int) -> str:
    colour = COLOURS[number % 5]
    return f"Number {number} is {colour}, and what is {colour} stays {colour} for ever." + " Nothing else is said." * (number % 3)


def packed(samples: Mapping[str, list[int]], epochs: list[int] | None = None, sequence_length: int = 80) -> PackedExample:
    """A pack of samples, by id."""
    lengths = [len(tokens) for tokens in samples.values()]
    ids = np.concatenate([np.asarray(tokens, np.int32) for tokens in samples.values()])
    return PackedExample(
        pack=0, input_ids=ids, targets=np.full(len(ids), -100, np.int32),
        position_ids=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])[None],
        segment_ends=np.cumsum(lengths, dtype=np.int32),
        **no_pixels(3, 1), sample_ids=list(samples), sources=["s"] * len(samples), kinds=["text"] * len(samples),
        sequence_length=sequence_length, epochs=np.asarray([0] * len(samples) if epochs is None else epochs, np.int32),
    )  # fmt: skip


def flops_of_a_step_are_planned(model: Any, shape: Any) -> None:
    lengths, rng = [40, 13, 60], np.random.default_rng(0)
    pack = packed({str(number): rng.integers(4, 300, length).tolist() for number, length in enumerate(lengths)}, sequence_length=128)
    pack.targets[::7] = pack.input_ids[::7]
    batch = to_device(pack, "cpu", torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the only kernel it counts on a CPU
        asked = asked_rows(model, batch)
        output_layer(model)(asked, batch.targets, 1_000).backward()
    load = exact_load(shape, lengths, [(0, 0)], pack.supervised_tokens)
    assert training_flops(shape, load, ["language"]).model == pytest.approx(counter.get_total_flops(), rel=0.01)
    model.zero_grad()


@pytest.mark.parametrize("name", CLASSES)
def test_loss_gradients_parameters_and_start_are_those_of_the_class(name, tmp_path):
    torch.set_num_threads(1)
    family = family_class(name)
    tokenizer = train_tokenizer([text_of(number) for number in range(40)], 330, tmp_path, family)
    section = Model.model_validate({"architecture": name, "config": TOWER})
    config = model_config(section, tokenizer)
    model = build_model(section, config)
    use_attention(model, "sdpa_segments")
    seen, shape = family_of_model(model), shape_of_config(config.to_dict(), name)
    counted = {part: sum(p.numel() for _, p in pairs) for part, pairs in part_parameters(model).items()}
    assert parameter_counts(shape) == {"vision": 0, "projector": 0} | counted
    assert part_sizes(shape)["language"].block == sum(p.numel() for p in seen.blocks_of(model, "language")[0].parameters())
    flops_of_a_step_are_planned(model, shape)
    published = AutoModelForMaskedLM.from_config(config)
    assert type(published) is CLASSES[name]
    assert {key for key, _ in published.named_parameters()} == {key for key, _ in model.named_parameters()}
    for key, ours in model.named_parameters():
        theirs = dict(published.named_parameters())[key]
        if ours.numel() > 64 or float(theirs.detach().std()) == 0:
            assert float(ours.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.3, abs=1e-9), key
    assert all((p.dim() > 1) == has_weight_decay(key) for key, p in model.named_parameters())
    published.load_state_dict(model.state_dict())
    published.eval()

    marks = tokenizer.marks(family)
    samples = {str(n): [marks["start"], *tokenizer.encode(text_of(n)), marks["end_of_text"]] for n in range(7)}
    masking = Masking.of(MlmOptions(), 3, tokenizer, seen.family)
    alone = [masking.pack(packed({key: tokens})) for key, tokens in samples.items()]
    longest = max(pack.tokens for pack in alone)
    empty = {"input_ids": marks["pad"], "labels": -100, "attention_mask": 0}
    rows = {key: np.full((len(alone), longest), fill) for key, fill in empty.items()}
    for row, pack in enumerate(alone):
        for key, values in (("input_ids", pack.input_ids), ("labels", pack.targets), ("attention_mask", 1)):
            rows[key][row, : pack.tokens] = values
    wanted = published(**{key: torch.from_numpy(values).long() for key, values in rows.items()})
    wanted.loss.backward()
    divisor = sum(pack.supervised_tokens for pack in alone)
    told, right = 0.0, 0
    for names in (list(samples)[:4], list(samples)[4:5], list(samples)[5:]):
        batch = to_device(masking.pack(packed({key: samples[key] for key in names})), "cpu", torch.float32)
        asked = asked_rows(model, batch)
        right += right_tokens(output_layer(model), asked, batch.targets)
        loss = output_layer(model)(asked, batch.targets, 5) / divisor
        loss.backward()
        told += float(loss.detach())
    assert told == pytest.approx(float(wanted.loss.detach()), rel=1e-6)
    labels = torch.from_numpy(rows["labels"])
    assert right == int((wanted.logits.argmax(-1) == labels).sum())
    largest = max(float(p.grad.abs().max()) for p in published.parameters())
    for (key, ours), theirs in zip(model.named_parameters(), published.parameters()):
        assert float((ours.grad - theirs.grad).abs().max()) < 1e-6 * largest, key


WORD_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##think", "##able", "it", "is", "red", "."]


def word_pieces(folder: Path) -> Any:
    """A WordPiece tokenizer as BERT is published with, without its published words."""
    made = Tokenizer(models.WordPiece({token: number for number, token in enumerate(WORD_PIECES)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(WORD_PIECES[:5])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_masks_are_those_of_sample_and_epoch_alone_and_never_of_a_mark(tmp_path):
    family = family_class("bert")()
    tokenizer = train_tokenizer([text_of(number) for number in range(40)], 330, tmp_path / "bytes", family)
    marks, options = tokenizer.marks(family), MlmOptions()
    samples = {str(n): [marks["start"], *tokenizer.encode(text_of(n)), marks["end_of_text"]] for n in range(300)}
    masking = Masking.of(options, 3, tokenizer, family)
    together = masking.pack(packed(samples))
    assert sorted(masking.special.nonzero()[0].tolist()) == sorted(marks.values())
    starts = [0, *together.segment_ends.tolist()]
    for number, (name, tokens) in enumerate(samples.items()):
        place = slice(starts[number], starts[number + 1])
        alone = masking.pack(packed({name: tokens}))  # in a pack by itself
        np.testing.assert_array_equal(alone.input_ids, together.input_ids[place])
        np.testing.assert_array_equal(alone.targets, together.targets[place])
        chosen = alone.targets >= 0
        assert chosen.sum() == max(1, round(0.15 * (len(tokens) - 2)))
        np.testing.assert_array_equal(alone.targets[chosen], np.asarray(tokens)[chosen])
        np.testing.assert_array_equal(alone.input_ids[~chosen], np.asarray(tokens)[~chosen])
    chosen = together.targets >= 0
    read, told = together.input_ids[chosen], together.targets[chosen]
    assert not np.isin(told, list(marks.values())).any()
    shares = (read == marks["mask"]).mean(), ((read != marks["mask"]) & (read != told)).mean(), (read == told).mean()
    np.testing.assert_allclose(shares, (0.8, 0.1, 0.1), atol=0.03)
    assert not np.isin(read[read != marks["mask"]], list(marks.values())).any()
    later, elsewhere = masking.pack(packed(samples, [1] * 300)), Masking.of(options, 4, tokenizer, family).pack(packed(samples))
    held = masking.pack(packed(samples, []))
    for other in (later, elsewhere, held):
        assert 0.05 < ((other.targets >= 0) & chosen).sum() / chosen.sum() < 0.3  # as many as by chance
    np.testing.assert_array_equal(masking.pack(packed(samples, [])).targets, held.targets)
    two = {"a": samples["0"], "b": samples["1"]}  # pieces of one sample
    pieces = [masking.pack(packed({"a": tokens})).targets >= 0 for tokens in two.values()]
    assert len(pieces[0]) != len(pieces[1]) or (pieces[0] != pieces[1]).any()
    nothing = masking.pack(packed({"empty": [marks["start"], marks["end_of_text"]]}))
    assert nothing.supervised_tokens == 0


def test_special_tokens_that_are_no_marks_are_neither_asked_for_nor_put_anywhere(tmp_path):
    tokenizer = word_pieces(tmp_path / "pieces")
    marks = tokenizer.marks(family := family_class("bert")())
    unknown = WORD_PIECES.index("[UNK]")  # the tokenizer calls it special, and no family writes it
    assert unknown not in marks.values()
    masking = Masking.of(MlmOptions(share=0.5, masked=0.0, replaced=1.0), 3, tokenizer, family)
    tokens = [marks["start"], *([unknown, 5, 8, 10] * 200), marks["end_of_text"]]
    made = masking.pack(packed({"a": tokens}))
    assert unknown not in made.targets
    assert (made.input_ids == unknown).sum() == 200


def test_whole_words_are_taken_or_left_as_a_tokenizer_marks_them(tmp_path):
    family, options = family_class("bert")(), MlmOptions(whole_words=True, share=0.4)
    tokenizer = word_pieces(tmp_path / "pieces")
    tokens = [2, *tokenizer.encode("unthinkable is red. it is unthinkable."), 3]
    assert [WORD_PIECES[token] for token in tokens[1:5]] == ["un", "##think", "##able", "is"]
    words = [[1, 2, 3], [4], [5], [6], [7], [8], [9, 10, 11], [12]]
    masking, whole = Masking.of(options, 0, tokenizer, family), set()
    for epoch in range(40):
        chosen = set(np.flatnonzero(masking.pack(packed({"a": tokens}, [epoch])).targets >= 0).tolist())
        assert 3 <= len(chosen) <= 5  # of 12, as many as whole words allow
        assert all(chosen >= set(word) or not chosen & set(word) for word in words)
        whole |= chosen
    assert whole == set(range(1, 13))
    one_word = packed({"a": [2, 5, 6, 7, 3]})  # longer than the share: the word all the same, never nothing
    assert masking.pack(one_word).supervised_tokens == 3
    byte_level = train_tokenizer([text_of(number) for number in range(40)], 330, tmp_path / "bytes", family)
    begins = byte_level.begins_words()
    ids = byte_level.encode("Number stays for ever.")
    assert begins is not None
    assert [begins[token] for token in ids].count(True) == 3  # behind each blank
    plain = Tokenizer(models.WordLevel({token: number for number, token in enumerate(WORD_PIECES)}, unk_token="[UNK]"))
    (tmp_path / "plain").mkdir()
    plain.save(str(tmp_path / "plain" / "tokenizer.json"))
    with pytest.raises(InputError, match=r"mlm.whole_words: .* do not say where a word begins"):
        Masking.of(options, 0, load_tokenizer(tmp_path / "plain"), family)
    with pytest.raises(ValueError, match="more than 1 together"):
        MlmOptions(masked=0.8, replaced=0.3)


# ---------------------------------------------------------------- stages

LAYOUTS = {2: ("ddp", "fsdp", "zero2", "zero3"), 4: ("ddp",)}  # ranks and strategies


def recipe_of(folder: Path, architecture: str = "bert", **stage: Any) -> Recipe:
    """Short texts in two epochs, and documents that are longer than the model's positions."""
    rows = {
        "short": [{"text": text_of(number)} for number in range(28)],
        "long": [{"text": "\n".join(text_of(number + step) for step in range(12))} for number in range(4)],
    }
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    one = {
        "name": "mlm", "objective": "mlm", "train": {"language": {"lr": 3e-3}}, "precision": "fp32", "sequence_length": 72,
        "batch": {"packs": 4}, "mixture": {"weights": {"short": 3.0, "long": 1.0}}, "budget": {"steps": 6}, "loss_chunk_tokens": 7,
        "checkpoint": {"every_steps": 1}, "schedule": {"kind": "constant", "warmup": 0},
        "data_loading": {"engine": "inline", "window_samples": 16},
    }  # fmt: skip
    sources = {
        "short": {"uri": str(folder / "short.jsonl"), "kind": "text", "holdout_samples": 5},
        "long": {"uri": str(folder / "long.jsonl"), "kind": "document", "holdout_samples": 1, "too_long": "split"},
    }
    return Recipe.model_validate({
        "name": "mlm", "model": {"architecture": architecture, "config": TOWER}, "tokenizer": {"train_vocabulary_size": 330},
        "data": {"sources": sources}, "stages": [{**one, **stage}],
    })  # fmt: skip


def train_texts(rank: int, world_size: int, values: dict[str, Any], runs: list[tuple[str, str]]) -> None:
    """The recipe's stage under each strategy, in a run directory whose data is prepared."""
    for strategy, run in runs:
        recipe = Recipe.model_validate(values)
        [stage] = recipe.stages
        stage = stage.model_copy(update={"parallel": stage.parallel.model_copy(update={"strategy": strategy})})
        run_stage(recipe.model_copy(update={"stages": [stage]}), 0, Path(run), 1, WorkerContext(rank, world_size, rank))


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "stages" / "01-mlm" / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> str:
    [file] = (run / "stages" / "01-mlm" / "final").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("architecture", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_texts_of_a_source_train_resume_and_export(architecture, tmp_path):
    torch.set_num_threads(1)
    recipe = recipe_of(tmp_path, architecture)
    assert check(recipe) == []
    run, again = tmp_path / "run", tmp_path / "again"
    for folder in (run, again):
        prepared = prepare_data(recipe, folder, use_ray=False)
    result = run_stage(recipe, 0, run, 1, WorkerContext())
    before, after = result.evaluation["before"], result.evaluation["after"]
    assert set(before) == {f"{kind}/{figure}" for kind in ("document", "text") for figure in ("loss", "accuracy")}
    assert after["text/loss"] < before["text/loss"]
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 0, again, 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 3 else None))
    run_stage(recipe, 0, again, 2, WorkerContext())
    assert weights(again) == weights(run)
    lines = [json.loads(line) for line in (run / "stages" / "01-mlm" / "metrics.jsonl").read_text().splitlines()]
    assert all(0.1 < line["supervised_tokens"] / line["tokens"] < 0.2 for line in lines)  # in every pass over the source others
    final = run / "stages" / "01-mlm" / "final"
    loaded, told = CLASSES[architecture].from_pretrained(final, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert sorted(file.name for file in final.iterdir() if "token" not in file.name) == ["config.json", "model.safetensors"]
    reader = AutoTokenizer.from_pretrained(final)
    marks = family_class(architecture).marks
    assert (reader.mask_token, reader.pad_token, reader.cls_token) == (marks["mask"], marks["pad"], marks["start"])
    masking = Masking.of(MlmOptions(), 0, load_tokenizer(prepared.tokenizer_dir), family_class(architecture)())
    total, count = 0.0, 0
    for pack in map(masking.pack, held_out_packs(recipe, 0, prepared)["text"]):
        for start, end in zip([0, *pack.segment_ends], pack.segment_ends):
            row, labels = (torch.from_numpy(values[start:end])[None].long() for values in (pack.input_ids, pack.targets))
            asked_for = int((labels >= 0).sum())
            total += float(loaded.eval()(input_ids=row, labels=labels).loss.detach()) * asked_for
            count += asked_for
    assert total / count == pytest.approx(after["text/loss"], rel=1e-5)  # the export says of held-out texts what the stage said


def test_mistakes_are_told_by_name(tmp_path):
    def told(**stage: Any) -> str:
        return "\n".join(str(problem) for problem in check(recipe_of(tmp_path, **stage)))

    assert "81 tokens are more than the 80 positions of a sample in bert" in told(sequence_length=81)
    assert "79 tokens are more than the 78 positions" in "\n".join(map(str, check(recipe_of(tmp_path, "roberta", sequence_length=79))))
    assert "bert fills masked tokens of a text: train it with mlm" in told(objective="lm")
    assert "has no part vision" in told(train={"vision": {"lr": 1e-3}, "language": {"lr": 1e-3}})
    assert "mlm" in told(objective="lm", mlm={"share": 0.2})
    config = TOWER | {"hidden_dropout_prob": 0.1, "is_decoder": True}
    values = recipe_of(tmp_path).model_dump(mode="json")
    values["model"]["config"] = config
    found = [str(problem) for problem in check(Recipe.model_validate(values))]
    assert any("hidden_dropout_prob" in line and "must be 0" in line for line in found)
    assert any("is_decoder" in line and "must be false" in line for line in found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_under_every_strategy_give_the_losses_of_one(tmp_path):
    recipe = recipe_of(tmp_path, mlm={"whole_words": True})
    runs = {ranks: [(name, str(tmp_path / f"{name}-{ranks}")) for name in names] for ranks, names in LAYOUTS.items()}
    for folder in (tmp_path / "one", *(run for layout in runs.values() for _, run in layout)):
        prepare_data(recipe, Path(folder), use_ray=False)
    values = recipe.model_dump(mode="json")
    train_texts(0, 1, values, [("ddp", str(tmp_path / "one"))])
    for ranks, layout in runs.items():
        run_ranks(ranks, train_texts, values, layout, timeout=400)
        for strategy, run in layout:
            np.testing.assert_allclose(losses(Path(run)), losses(tmp_path / "one"), rtol=2e-5, err_msg=f"{strategy} on {ranks}")


# ---------------------------------------------------------------- into two towers


def curriculum(folder: Path, text: str) -> Recipe:
    """An encoder of pictures and one of texts, each by itself, then both as the towers of one model."""
    write_rows(folder)
    encoder = {**TOWER, "max_position_embeddings": 34}
    pictures = {**{key: TOWER[key] for key in TOWER if key not in ("max_position_embeddings", "initializer_range")}, "image_size": 28,
                "patch_size": 14}  # fmt: skip
    decoder = {"decoder_hidden_size": 16, "decoder_intermediate_size": 32, "decoder_num_hidden_layers": 1,
               "decoder_num_attention_heads": 2, "norm_pix_loss": True}  # fmt: skip
    towers = {"architecture": "vision_text_dual_encoder", "init": {"vision": "stage:mae", "language": "stage:mlm"}, "config": {
        "projection_dim": 16, "vision_config": pictures, "text_config": encoder | {"model_type": text},
    }}  # fmt: skip
    every = {
        "precision": "fp32", "mixture": {"weights": {"captions": 1.0}}, "budget": {"steps": 3}, "checkpoint": {"every_steps": 1},
        "schedule": {"kind": "constant", "warmup": 0}, "data_loading": {"engine": "inline"}, "sequence_length": 32,
        "pixels": {"min": 1, "max": 3_136},
    }  # fmt: skip
    few = {"batch": {"packs": 2, "samples_per_pack": 5}}
    return Recipe.model_validate({
        "name": "towers", "model": {"architecture": "vit_mae", "config": pictures | decoder}, "tokenizer": {"train_vocabulary_size": 330},
        "data": {"sources": {"captions": {"uri": str(folder / "captions.jsonl"), "holdout_samples": 8, "too_long": "truncate_text"}}},
        "stages": [
            {"name": "mae", "objective": "mae", "train": {"vision": {"lr": 1e-3}, "projector": {"lr": 1e-3}}, **every, **few},
            {"name": "mlm", "objective": "mlm", "train": {"language": {"lr": 1e-3}}, **every, "batch": {"packs": 4},
             "model": {"architecture": text, "config": encoder}},
            {"name": "clip", "objective": "clip", "train": {part: {"lr": 1e-3} for part in ("vision", "projector", "language")}, **every,
             **few, "model": towers},
        ],
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("text", CLASSES)
def test_an_encoder_that_filled_masks_becomes_the_text_tower_of_two(text, tmp_path):
    torch.set_num_threads(1)
    recipe = curriculum(tmp_path, text)
    assert check(recipe) == []
    check_taken(recipe)
    runs = [tmp_path / "run", tmp_path / "again"]
    for run in runs:
        prepare_data(recipe, run, use_ray=False)
        for number in range(2):
            run_stage(recipe, number, run, 1, WorkerContext())
    finals = [runs[0] / "stages" / f"{number + 1:02d}-{stage.name}" / "final" for number, stage in enumerate(recipe.stages)]
    prefixes = {"vision_model.": ("vit.", Directory(finals[0])), "text_model.": (f"{text}.", Directory(finals[1]))}
    opened = [Directory(str(finals[number]), family_model_named("vision_text_dual_encoder")) for number in range(2)]
    for prefix, (own, directory) in prefixes.items():
        taken = opened[0] if own == "vit." else opened[1]
        names = [name for name in taken.names if name.startswith(prefix)]
        assert len(names) > 30
        assert all(torch.equal(taken.read(name), directory.read(own + name.removeprefix(prefix))) for name in names)
    result = run_stage(recipe, 2, runs[0], 1, WorkerContext())
    assert result.evaluation["after"]["caption/loss"] < result.evaluation["before"]["caption/loss"]
    asked = iter(range(100))
    with pytest.raises(Preempted):
        run_stage(recipe, 2, runs[1], 1, WorkerContext(should_stop=lambda: "told" if next(asked) >= 1 else None))
    run_stage(recipe, 2, runs[1], 2, WorkerContext())
    ends = [hashlib.sha256((run / "stages" / "03-clip" / "final" / "model.safetensors").read_bytes()).hexdigest() for run in runs]
    assert ends[0] == ends[1]
    loaded, told = VisionTextDualEncoderModel.from_pretrained(finals[2], output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert (loaded.config.text_config.model_type, loaded.config.vision_config.model_type) == (text, "vit")
    processor = VisionTextDualEncoderProcessor.from_pretrained(finals[2])
    read = processor(text=["A picture in red"], images=[Image.new("RGB", (40, 30))], return_tensors="pt")
    assert {"input_ids", "pixel_values"} <= set(read)
    moved = Directory(str(finals[2]))
    assert not torch.equal(moved.read("text_model.encoder.layer.0.output.dense.weight"),
                           opened[1].read("text_model.encoder.layer.0.output.dense.weight"))  # fmt: skip
