"""`terrace evaluate` with a tiny model: batched answers equal single ones, workers change nothing, real files run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from single_answers import answer, load_speaker

from terrace.cli import main
from terrace.data.prepare import prepare_data
from terrace.data.tokenizer import train_tokenizer
from terrace.errors import InputError
from terrace.evaluate.compare import compare
from terrace.evaluate.engine import load_model
from terrace.evaluate.replies import Settings
from terrace.evaluate.run import evaluate_model, read_results
from terrace.evaluate.sample_losses import held_out_cases, loss_measure
from terrace.evaluate.suites import Reading, load_suites
from terrace.families.interface import Sight
from terrace.families.qwen2_5_vl import Qwen25VL
from terrace.models.build import build_model, model_config
from terrace.models.export import export_hf
from terrace.recipe.schema import Model, Recipe

FAMILY = Qwen25VL()

PIXELS = (3136, 12544)
TEXTS = ["How many circles are in the picture? A red circle. Give the box as [x1, y1, x2, y2] in pixels."] * 3


def make_model(folder: Path, tokenizer_dir: Path | None = None, seed: int = 0) -> Path:
    """A random model whose weights are large enough that it says different things."""
    if tokenizer_dir is None:
        tokenizer = train_tokenizer(TEXTS, 320, folder / "tokenizer", FAMILY)
    else:
        from terrace.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(tokenizer_dir)
    shape = {
        "text_config": {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "initializer_range": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1],
        },
    }  # fmt: skip
    model = Model.model_validate({"config": shape, "seed": seed})
    config = model_config(model, tokenizer)
    state = {name: parameter.detach() for name, parameter in build_model(model, config).named_parameters()}
    return export_hf(state, config, tokenizer.directory, folder / "final", pixels=PIXELS)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def test_batched_answers_equal_single_ones(model_dir, shared_data):
    suites = load_suites(
        [
            f"counting:{shared_data}/rl/counting.jsonl", f"reasoning:{shared_data}/rl/text_math.jsonl",
            f"caption:{shared_data}/captions.jsonl",
        ],
        Reading(Sight(FAMILY, PIXELS), limit=3),
    )  # fmt: skip
    model, speaker = load_model(model_dir, "cpu"), load_speaker(model_dir)
    said = set()
    for suite in suites:
        for case, reply in zip(suite.cases, model.reply(suite.cases, 12)):
            single = answer(speaker, case.prompt, case.read_images(), 12)
            assert (reply.text, reply.finished) == (single.text, single.finished)
            said.add(reply.text)
    assert len(said) > 3  # one constant answer would agree with anything


def test_every_kind_runs_on_the_real_files(model_dir, shared_data, tmp_path, capsys):
    files = {
        "mmbench": "eval/grocery_mmbench.tsv", "grounding": "rl/grounding.jsonl", "gui": "rl/gui.jsonl",
        "counting": "rl/counting.jsonl", "ocr": "ocr.jsonl", "chart": "rl/visual_math.jsonl", "caption": "captions.jsonl",
        "reasoning": "rl/text_math.jsonl",
    }  # fmt: skip
    texts = [f"{kind}:{shared_data / file}" for kind, file in files.items()]
    out = tmp_path / "out"
    options = [
        "--json",
        "--out",
        str(out),
        "--limit",
        "2",
        "--max-new-tokens",
        "6",
        "--vlmevalkit",
        str(tmp_path / "kit"),
    ]
    assert main(["evaluate", str(model_dir), *texts, *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    scores, rows = read_results(out)
    assert printed == scores
    assert len(scores["suites"]) == 8
    assert len(rows) == 7 * 2 + 2 * 4
    assert all(row.prompt and row.answer_tokens for row in rows)
    assert (tmp_path / "kit" / "final" / "final_grocery_mmbench.tsv").is_file()
    assert main(["evaluate", "--compare", str(out), str(out)]) == 0


@pytest.mark.slow
def test_two_workers_give_the_scores_of_one(model_dir, shared_data, tmp_path):
    texts = [f"mmbench:{shared_data}/eval/grocery_mmbench.tsv", f"counting:{shared_data}/rl/counting.jsonl"]
    results = []
    for workers in (1, 2):
        settings = Settings(limit=6, max_new_tokens=6, batch_size=4, workers=workers, device="cpu")
        scores = evaluate_model(model_dir, texts, tmp_path / str(workers), settings)
        results.append((scores["suites"], read_results(tmp_path / str(workers))[1]))
    assert results[0] == results[1]


def test_held_out_loss_is_that_of_the_whole_sample(shared_data, tmp_path):
    recipe = Recipe.model_validate(
        {
            "name": "small", "model": {"config": {"text_config": {}}}, "tokenizer": {"train_vocabulary_size": 400},
            "data": {
                "sources": {
                    "gui": {
                        "uri": str(shared_data / "gui.jsonl"), "kind": "grounding", "images_root": str(shared_data),
                        "holdout_samples": 3,
                    },
                }
            },
            "stages": [{"name": "one", "train": {"language": {"lr": 1e-3}}, "mixture": {"gui": 1.0}, "sequence_length": 512,
                        "budget": {"steps": 1}, "batch": {"packs": 1}, "pixels": {"min": PIXELS[0], "max": PIXELS[1]}}],
        }
    )  # fmt: skip
    prepared = prepare_data(recipe, tmp_path / "run", use_ray=False)
    directory = make_model(tmp_path / "model", prepared.tokenizer_dir)
    with pytest.raises(InputError, match=r"--engine vllm: .* measures losses"):
        evaluate_model(directory, [f"loss:{tmp_path / 'run'}"], tmp_path / "out", Settings(device="cpu", engine="vllm"))
    scores = evaluate_model(directory, [f"loss:{tmp_path / 'run'}"], tmp_path / "out", Settings(device="cpu"))
    [suite] = scores["suites"].values()
    assert suite["cases"] == 3
    assert suite["categories"]["grounding"] == suite["scores"]

    from terrace.data.stream.read import read_sample
    from terrace.data.template import encode_sample

    model = load_model(directory, "cpu")
    [case, *_] = held_out_cases(tmp_path / "run", Sight(prepared.family, PIXELS), None)
    [measured] = loss_measure(tmp_path / "run", model)([case])
    index, row = prepared.indexes["gui"], case.metadata["row"]
    encoded = encode_sample(read_sample(index, row)[0], index.sizes(row), model.tokenizer, FAMILY, PIXELS)
    assert measured["tokens"] == encoded.supervised.sum()
    assert 0.2 * math.log(400) < measured["loss_sum"] / measured["tokens"] < 20 * math.log(400)
    with torch.no_grad():
        captured = {}
        model.network.lm_head.register_forward_hook(
            lambda _, inputs, output: captured.update(hidden=inputs[0], targets=inputs[1])
        )
        [again] = loss_measure(tmp_path / "run", model)([case])
        logits = torch.nn.functional.linear(captured["hidden"], model.network.lm_head.weight)
    assert again == measured
    assert captured["targets"].tolist() == encoded.input_ids[encoded.supervised].tolist()
    expected = torch.nn.functional.cross_entropy(logits, captured["targets"], reduction="sum")
    assert measured["loss_sum"] == pytest.approx(float(expected), rel=1e-5)

    evaluate_model(
        directory, [f"loss:{tmp_path / 'run'}"], tmp_path / "sharp", Settings(device="cpu", pixels=(3136, 25088))
    )
    with pytest.raises(InputError, match=r"pixels .3136, 12544. and .3136, 25088."):
        compare(tmp_path / "out", tmp_path / "sharp")

    other = make_model(tmp_path / "other")
    with pytest.raises(InputError, match="another tokenizer"):
        evaluate_model(other, [f"loss:{tmp_path / 'run'}"], tmp_path / "out2", Settings(device="cpu"))


def test_vllm_answers_in_place_of_the_native_engine(model_dir, tmp_path, monkeypatch):
    import fake_vllm

    rows = [{"messages": [{"role": "user", "content": f"How many? {number}"}], "solution": "3"} for number in range(3)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counting = f"counting:{tmp_path}/c.jsonl"
    out = ["--out", str(tmp_path / "out"), "--engine", "vllm", "--device", "cpu", "--max-new-tokens", "3"]
    seen = fake_vllm.install(monkeypatch)
    seen.pad = -1  # no pictures here
    with pytest.raises(InputError, match="computes on cuda"):
        evaluate_model(model_dir, [counting], tmp_path / "out", Settings(engine="vllm", device="cpu"))
    seen.device_type = "cpu"
    assert main(["evaluate", str(model_dir), counting, *out]) == 0
    assert (seen.names.count("open"), seen.alive) == (1, 0), "opened once, and ended"
    options = dict(seen.calls)["open"]
    assert (options["dtype"], options["enable_sleep_mode"]) == ("float32", False)
    assert not Path(options["model"]).exists(), "its view of the directory is gone"
    assert [row.answer_tokens for row in read_results(tmp_path / "out")[1]] == [2, 3, 2]
    with pytest.raises(InputError, match=r"case .* tokens and an answer of up to 40000 are more than engine vllm is opened for"):
        evaluate_model(model_dir, [counting], tmp_path / "out", Settings(engine="vllm", device="cpu", max_new_tokens=40_000))
    assert seen.alive == 0
