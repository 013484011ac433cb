"""Recipes are read as written, and everything that is wrong is named with its file, line and way out."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from terrace.recipe.errors import RecipeError
from terrace.recipe.identity import recipe_hash, stage_hash, start_index
from terrace.recipe.loading import dump_recipe, load_recipe, parse_recipe

TINY = Path(__file__).parent.parent / "recipes" / "tiny.yaml"


def refused(path: Path | str = TINY, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return caught.value


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_the_tiny_recipe_has_four_stages() -> None:
    recipe = load_recipe(TINY)
    assert [stage.name for stage in recipe.stages] == ["projector-warmup", "alignment", "pretraining", "long-context"]
    assert recipe.stages[0].mixture.weights == {"captions": 1.0}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("300e9", 300e9),
        ("1e-3", 1e-3),
        ("1.5E+2", 150.0),
        (".5", 0.5),
        ("1_000", 1000.0),
        ("0x10", 16.0),
        ("010", 10.0),
    ],
)
def test_numbers_are_numbers(written: str, read: float) -> None:
    assert load_recipe(TINY, [f"stages.0.budget.tokens={written}"]).stages[0].budget.tokens == read


def test_a_whole_float_is_an_integer_where_one_is_meant() -> None:
    assert load_recipe(TINY, ["stages.0.budget.samples=2e3"]).stages[0].budget.samples == 2000
    assert "valid integer" in str(refused(TINY, "stages.0.budget.steps=2.5"))


@pytest.mark.parametrize("written", ["'5'", "true", "12:30", "on", "1e999", "[5]"])
def test_other_types_are_not_read_as_numbers(written: str) -> None:
    assert "stages.0.budget.steps" in str(refused(TINY, f"stages.0.budget.steps={written}"))


def test_words_that_yaml_1_1_reads_as_booleans_stay_words() -> None:
    assert load_recipe(TINY, ["description=no", "name=on"]).description == "no"


def test_overrides_by_index_by_name_and_into_maps() -> None:
    recipe = load_recipe(
        TINY,
        [
            "stages.alignment.budget.steps=5",
            "stages.1.batch={packs: 6}",
            "stages.0.mixture.documents=2",
            "stages.0.mixture.captions=null",
            "stages.2.resources.workers=[2, 4]",
            "data.sources.more={uri: s3://bucket/more, kind: text}",
        ],
    )
    assert (recipe.stages[1].budget.steps, recipe.stages[1].batch.packs) == (5, 6)
    assert recipe.stages[0].mixture.weights == {"documents": 2.0}
    assert recipe.stages[2].resources.workers == (2, 4)
    assert recipe.data.sources["more"].uri == "s3://bucket/more"


def test_of_keys_that_exclude_each_other_the_override_wins() -> None:
    recipe = load_recipe(TINY, ["stages.0.budget.tokens=1e6", "tokenizer.path=/models/tokenizer",
                                "model.config.text_config.vocab_size=1024"])  # fmt: skip
    assert (recipe.stages[0].budget.steps, recipe.stages[0].budget.tokens) == (None, 1e6)
    assert (recipe.tokenizer.path, recipe.tokenizer.train_vocabulary_size) == ("/models/tokenizer", None)


def test_names_with_dots_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "dots.yaml"
    path.write_text(TINY.read_text().replace("captions", "cc.12m").replace("name: alignment", "name: v1.5"))
    recipe = load_recipe(path, ["data.sources.cc.12m.uri=/here", "stages.v1.5.budget.steps=9", "stages.0.mixture.cc.12m=3"])
    assert recipe.data.sources["cc.12m"].uri == "/here"
    assert recipe.stages[1].budget.steps == 9
    assert recipe.stages[0].mixture.weights == {"cc.12m": 3.0}


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stages.0.budgt.steps=5", "did you mean `budget`?"),
        ("stages.0.train.vison.lr=1", "did you mean `vision`?"),
        ("stages.0.precision=bf6", "did you mean `bf16`?"),
        ("stages.aligment.budget.steps=1", "did you mean `alignment`?"),
        ("stages.7.budget.steps=1", "there are 4, counted from 0"),
        ("data.sources.captions.kind=captoin", "did you mean `caption`?"),
        ("stages.0.mixture.captoins=1", "did you mean `captions`?"),
        ("modle.seed=3", "did you mean `model`?"),
        ("stages.0.budget.steps", "key.path=value"),
    ],
)
def test_a_wrong_override_is_named_with_the_nearest_valid_word(override: str, hint: str) -> None:
    message = str(refused(TINY, override))
    assert f"override `{override}`" in message
    assert hint in message


def test_errors_in_a_file_name_its_line_through_extends(tmp_path: Path) -> None:
    base, child = tmp_path / "base.yaml", tmp_path / "child" / "child.yaml"
    base.write_text(TINY.read_text().replace("    window_size: 112", "    window_size: 112\n      window_sise: 5")
                    .replace("schedule", "schedule").replace("    batch: {packs: 4}\n", "    bacth: {packs: 4}\n", 1))  # fmt: skip
    child.parent.mkdir()
    child.write_text("extends: ../base.yaml\nname: child\nstages:\n  alignment:\n    precison: fp32\n    seed: -1\n")
    error = refused(child)
    assert error.exit_status == 2
    text = str(error)
    assert f"base.yaml:{line_of(base, 'bacth')}: stages.0.bacth: unknown key; did you mean `batch`?" in text
    assert f"{child}:5: stages.1.precison: unknown key; did you mean `precision`?" in text
    assert f"{child}:6: stages.1.seed" in text
    assert len(error.problems) == 3
    assert text.splitlines()[0] == f"{child}: 3 problems"


def test_extends_merges_maps_and_replaces_lists(tmp_path: Path) -> None:
    child, grandchild = tmp_path / "child.yaml", tmp_path / "grandchild.yaml"
    child.write_text(f"extends: {TINY}\nname: child\ndata: {{sources: {{captions: {{uri: s3://bucket/captions}}}}}}\n")
    grandchild.write_text("extends: child.yaml\nstages:\n  alignment: {budget: {tokens: 1e6}, mixture: {documents: null, text: 1}}\n")
    recipe = load_recipe(grandchild)
    assert recipe.name == "child"
    assert recipe.data.sources["captions"].uri == "s3://bucket/captions"
    assert recipe.data.sources["captions"].holdout_samples == 4
    assert (recipe.stages[1].budget.steps, recipe.stages[1].budget.tokens) == (None, 1e6)
    assert recipe.stages[1].mixture.weights == {"captions": 1.0, "text": 1.0}


def test_an_extending_recipe_adds_stages_at_the_end_but_no_misspelled_ones(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    stage = "{train: {language: {lr: 1e-4}}, mixture: {text: 1}, budget: {steps: 2}, seed: 3}"
    child.write_text(f"extends: {TINY}\nname: child\nstages:\n  more: {stage}\n  alignment: {{seed: 5}}\n")
    recipe = load_recipe(child)
    names = ["projector-warmup", "alignment", "pretraining", "long-context", "more"]
    assert [stage.name for stage in recipe.stages] == names
    assert (recipe.stages[1].seed, recipe.stages[4].seed, recipe.stages[4].mixture.weights) == (5, 3, {"text": 1.0})
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: child.yaml\nstages:\n  more: {seed: 4}\n  alignmnt: {seed: 5, budget: {steps: 1}}\n")
    message = str(refused(grandchild))
    assert f"{grandchild}:4: stages.alignmnt: the extended recipe has no stage `alignmnt`" in message
    assert "a new stage needs train, mixture, budget" in message


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    message = str(refused(tmp_path / "a.yaml"))
    assert "a.yaml -> b.yaml -> a.yaml" in message
    assert "b.yaml:1" in message


def test_files_that_cannot_be_read_are_input_errors(tmp_path: Path) -> None:
    assert "cannot read the recipe" in str(refused(tmp_path / "absent.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in str(refused(tmp_path / "bytes.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "map of keys" in str(refused(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("name: a\nstages: [\n")
    assert "broken.yaml:3: not valid YAML" in str(refused(tmp_path / "broken.yaml"))
    (tmp_path / "empty.yaml").write_text("")
    assert "`name` is missing" in str(refused(tmp_path / "empty.yaml"))


def test_duplicate_keys_and_endless_aliases_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nmodel: {}\nname: b\n")
    assert "twice.yaml:3: key `name` is given twice, first on line 1" in str(refused(path))
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 9):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    path.write_text(bomb)
    assert "aliases" in str(refused(path))


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = tmp_path / "anchors.yaml"
    path.write_text(TINY.read_text().replace("budget: {steps: 4}", "budget: &four {steps: 4}", 1)
                    .replace("budget: {steps: 6}", "budget: {<<: *four}"))  # fmt: skip
    assert load_recipe(path).stages[2].budget.steps == 4


def test_a_missing_key_is_named_at_its_map(tmp_path: Path) -> None:
    path = tmp_path / "missing.yaml"
    path.write_text(TINY.read_text().replace("    mixture: {captions: 1.0}\n", ""))
    message = str(refused(path))
    assert f"missing.yaml:{line_of(path, 'name: projector-warmup')}: stages.0: `mixture` is missing" in message


def test_the_dump_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(TINY, ["stages.0.optimizer.clip=null", "stages.1.resources.workers=[1, 2]"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    again = load_recipe(path)
    assert again == recipe
    assert again.stages[0].optimizer.clip is None
    assert recipe_hash(again) == recipe_hash(recipe)


def test_parse_recipe_takes_plain_values_with_the_same_checks() -> None:
    plain = yaml.safe_load(dump_recipe(load_recipe(TINY)))
    assert parse_recipe(plain) == load_recipe(TINY)
    plain["stages"][0]["mixture"] = {"captions": 2}
    assert parse_recipe(plain).stages[0].mixture.weights == {"captions": 2.0}
    plain["stages"][0]["budgets"] = {}
    with pytest.raises(RecipeError, match=r"stages\.0\.budgets: unknown key; did you mean `budget`"):
        parse_recipe(plain)


def test_hashes_know_what_changes_the_result() -> None:
    recipe = load_recipe(TINY)
    layout = load_recipe(TINY, ["stages.1.resources.workers=2", "stages.1.parallel.strategy=zero2", "planning.mfu=0.3",
                                "stages.1.train.vision.activation_checkpointing=true"])  # fmt: skip
    later = load_recipe(TINY, ["stages.2.seed=7"])
    earlier = load_recipe(TINY, ["stages.0.train.projector.lr=2e-3"])
    assert [stage_hash(layout, k) for k in range(4)] == [stage_hash(recipe, k) for k in range(4)]
    assert [stage_hash(later, k) == stage_hash(recipe, k) for k in range(4)] == [True, True, False, False]
    assert all(stage_hash(earlier, k) != stage_hash(recipe, k) for k in range(4))
    assert recipe_hash(load_recipe(TINY, ["planning.mfu=0.3"])) == recipe_hash(recipe)
    assert recipe_hash(layout) != recipe_hash(recipe)


def test_where_rollouts_run_is_no_part_of_a_stage() -> None:
    """A stage that began colocated may go on with rollout workers; with another group size it is another stage."""
    demo = TINY.parents[2] / "jobs" / "recipes" / "demo-morl.yaml"
    recipe = load_recipe(demo)
    separate = load_recipe(demo, ["stages.morl.grpo.placement=separate", "stages.morl.grpo.rollout_workers=3"])
    larger = load_recipe(demo, ["stages.morl.grpo.samples_per_prompt=32"])
    assert (recipe.stages[4].rollout_workers, separate.stages[4].rollout_workers) == (0, 3)
    assert stage_hash(separate, 4) == stage_hash(recipe, 4) != stage_hash(larger, 4)


def test_start_index_follows_start_from() -> None:
    recipe = load_recipe(TINY, ["stages.3.start_from=projector-warmup"])
    assert [start_index(recipe, k) for k in range(4)] == [None, 0, 1, 0]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_no_override_text_breaks_out_as_another_error(text: str) -> None:
    with contextlib.suppress(RecipeError):
        load_recipe(TINY, [text])


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab:-{}[]&*!|>#,'\"\n 01e.", max_size=40))
def test_no_file_breaks_out_as_another_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)
