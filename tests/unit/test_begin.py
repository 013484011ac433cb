"""`terrace init`: what is decided from a checkpoint, rows and a machine; recipes that load; what cannot be used is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from families import picture

from terrace.begin.checkpoint import look_at_checkpoint, tokenizer_of
from terrace.begin.decide import Machine, decide, recipe_values
from terrace.begin.machine import fitted
from terrace.begin.rows import look_at
from terrace.begin.write import recipe_text
from terrace.cli import main
from terrace.errors import InputError
from terrace.planner.plan import make_plan
from terrace.recipe.loading import load_recipe

CPU = Machine(0, None, 16 * 2**30, 2)
ASK = {"role": "user", "content": "<image>How many?"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint and rows of many kinds."""
    from newcomer_world import write_checkpoint, write_rows

    folder = tmp_path_factory.mktemp("begin")
    write_checkpoint(folder / "checkpoint")
    write_rows(folder / "llama", rows=30)
    rows = folder / "rows"
    rows.mkdir()
    for number in range(3):
        (rows / f"{number}.png").write_bytes(picture(200 + 40 * number, 150, number))
    files = {
        "captions": [{"image": f"{number % 3}.png", "text": "a picture of it"} for number in range(50)],
        "qa": [{"messages": [ASK, {"role": "assistant", "content": "3"}], "images": ["0.png"]}] * 20,
        "text": [{"text": "words " * 30}] * 10,
        "counting-prompts": [{"messages": [ASK], "images": ["1.png"], "solution": 3, "task": "counting"}] * 8,
        "odd-prompts": [{"messages": [ASK], "images": ["1.png"], "solution": 3, "task": "poetry"}] * 8,
        "choices": [{"messages": [ASK, {"role": "assistant", "content": "3"}], "rejected_response": "4", "images": ["2.png"]}] * 8,
        "long": [{"messages": [{"role": "user", "content": "word " * 900}, {"role": "assistant", "content": "yes"}]}] * 3,
        "half": [{"image": "0.png", "text": "fine"}, {"image": "gone.png", "text": "missing"}],
        "strange": [{"foo": 1}],
        "none": [],
    }
    for name, lines in files.items():
        (rows / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "shards").mkdir()
    (folder / "shards" / "0.tar").write_bytes(b"\0" * 10240)
    return folder


@pytest.fixture(scope="module")
def checkpoint(world):
    return look_at_checkpoint(str(world / "checkpoint"))


@pytest.fixture(scope="module")
def look(world, checkpoint):
    tokenizer = tokenizer_of(checkpoint.directory)

    def one(*names: str):
        found = []
        for name in names:
            uri = str(world / "llama" if name == "llama" else world / "rows" / f"{name}.jsonl")
            found.append(look_at(uri, [other.name for other in found], tokenizer, checkpoint.family))
        return found

    return one


@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [("captions", "caption", 50), ("qa", "qa", 20), ("text", "text", 10), ("counting-prompts", "prompt", 8), ("choices", "preference", 8),
     ("llama", "instruction", 30)],
)  # fmt: skip
def test_rows_say_what_they_are(look, name, kind, rows):
    [found] = look(name)
    assert (found.kind, found.rows, found.exact, found.refused) == (kind, rows, True, {})
    assert found.with_images == (name != "text")


def test_refused_rows_are_counted_with_an_example(look):
    [found] = look("half")
    assert found.refused == {"missing_image": 1}
    assert "gone.png" in found.example


@pytest.mark.parametrize(
    ("path", "names", "stages"),
    [
        ("sft", ["captions", "qa", "text"], [("sft", ["captions", "qa", "text"])]),
        ("warmup+sft", ["captions", "qa"], [("projector-warmup", ["captions"]), ("sft", ["captions", "qa"])]),
        (
            "curriculum", ["captions", "qa"],
            [("projector-warmup", ["captions"]), ("alignment", ["captions"]), ("multimodal", ["captions", "qa"]),
             ("long-context", ["captions", "qa"])],
        ),
        ("morl", ["qa", "counting-prompts"], [("sft", ["qa"]), ("morl", ["counting-prompts"])]),
        ("morl", ["counting-prompts"], [("morl", ["counting-prompts"])]),
    ],
)  # fmt: skip
def test_every_path_gives_a_recipe_that_loads_and_plans(look, checkpoint, tmp_path, path, names, stages):
    sources = look(*names)
    values, plan, told = fitted(recipe_values("mine", checkpoint, sources, decide(checkpoint, sources, path, CPU)), CPU)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(values, told, "terrace init", str(file)))
    recipe = load_recipe(file)
    assert [(stage.name, list(stage.mixture.weights)) for stage in recipe.stages] == stages
    assert make_plan(recipe).stages[0].memory.total == plan.stages[0].memory.total
    assert recipe.model_dump(exclude={"notes"}) == type(recipe).model_validate(values).model_dump(exclude={"notes"})
    if path == "morl":
        assert recipe.stages[-1].rewards["counting"][0].name == "counting"


def test_what_is_decided_follows_checkpoint_rows_and_machine(look, checkpoint):
    few = look("captions")
    small = decide(checkpoint, few, "sft", CPU)
    assert small.pixels == (784, max(view.size[0] * view.size[1] for view in [checkpoint.family.view(280, 150, (784, 10**6))]))
    assert (small.precision, small.workers, small.window) == ("fp32", 1, 16)
    assert small.stages[0].trains == {"projector": 1e-3, "language": 1e-3}
    large = decide(replace(checkpoint, parameters=8 * 10**9), few, "sft", Machine(8, "h100-80gb", 10**12, 64))
    assert large.stages[0].trains == {"projector": 1e-5, "language": 1e-5}
    assert (large.precision, large.workers, large.packs % 8) == ("bf16", 8, 0)
    long = decide(replace(checkpoint, longest=512), look("long"), "sft", CPU)
    assert long.stages[0].sequence_length == 512
    assert any("3 rows are longer" in why for _, why in long.told)
    assert decide(checkpoint, look("long"), "sft", CPU).stages[0].sequence_length == 2048


def test_a_strategy_that_fits_the_gpus_is_chosen(look, checkpoint):
    sources = look("captions")
    machine = Machine(2, "l4-24gb", 10**12, 16)
    values = recipe_values("mine", checkpoint, sources, decide(checkpoint, sources, "sft", machine))
    fit, _, _ = fitted(values, machine)
    assert "parallel" not in fit["stages"][0]
    tiny = {**values, "planning": {"gpus": {"l4-24gb": {"memory_gib": 0.001, "bf16_tflops": 10}}}}
    _, plan, told = fitted(tiny, machine)
    assert not plan.fits
    assert "nothing fits" in told[-1][1]


@pytest.mark.parametrize(
    ("names", "path", "words"),
    [
        (["choices"], "sft", "preference rows"),
        (["counting-prompts"], "sft", "--stages morl"),
        (["qa"], "morl", "wants prompts"),
        (["odd-prompts"], "morl", "task poetry"),
    ],
)
def test_rows_without_a_stage_are_refused(look, checkpoint, names, path, words):
    with pytest.raises(InputError, match=words):
        decide(checkpoint, look(*names), path, CPU)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--from", "{}/nothing", "--data", "{}/llama"], "no such folder"),
        (["--from", "Qwen/Qwen2.5-VL-7B-Instruct", "--data", "{}/llama"], "hf download"),
        (["--from", "{}/rows", "--data", "{}/llama"], "lacks config.json, tokenizer.json, *.safetensors"),
        (["--from", "{}/checkpoint", "--data", "{}/nothing"], "no such file or folder"),
        (["--from", "{}/checkpoint", "--data", "{}/shards"], "shards already"),
        (["--from", "{}/checkpoint", "--data", "{}/rows/strange.jsonl"], "foo"),
        (["--from", "{}/checkpoint", "--data", "{}/rows/none.jsonl"], "no readable row"),
        (["--data", "{}/llama"], "--from"),
    ],
)
def test_what_cannot_begin_is_said_in_one_line(world, tmp_path, capsys, given, words):
    assert main(["init", str(tmp_path / "mine"), *(word.format(world) for word in given)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_the_command_writes_a_recipe_once(world, tmp_path, capsys):
    given = ["init", str(tmp_path / "mine"), "--from", str(world / "checkpoint"), "--data", str(world / "llama")]
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "30 rows, instruction (llama_factory)" in told
    assert f"terrace run {tmp_path / 'mine' / 'recipe.yaml'}" in told
    assert main(given) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*given, "--force", "--stages", "warmup+sft"]) == 0
    assert [stage.name for stage in load_recipe(tmp_path / "mine" / "recipe.yaml").stages] == ["projector-warmup", "sft"]
