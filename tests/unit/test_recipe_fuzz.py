"""Mutated recipes: each loads, or is refused with file and line for every problem; no traceback, no hang, no memory."""

from __future__ import annotations

import random
import re
import resource
import time
from pathlib import Path

import pytest

from terrace.recipe import shipped
from terrace.recipe.errors import RecipeError
from terrace.recipe.identity import recipe_hash, stage_hash
from terrace.recipe.loading import dump_recipe, load_recipe, parse_recipe
from terrace.recipe.questions import questions

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
ODD = (
    "", "null", "~", "true", "-1", "0", "1e308", "1e309", "-.inf", ".nan", "1_000", "0x10", "9" * 5000, "1e-400", "[]", "{}",
    "[[[]]]", "{a: {b: {c: 1}}}", "'quoted'", '"\\0"', '"\\ud800"', "!!int 5", "!!python/object:os.system x", "!x y", "*nowhere",
    "&a [*a]", "<<", "? a", "s3://bucket/x", "gs://b/c", "http://u:p@h/x", "../../../etc/passwd", "/dev/zero", "~nobody/x",
    "\u2028", "\U0001f600", "a" * 5000, "%s", "{{x}}", "2026-01-01", "12:30", "yes", "[1, 2, 3]", "[64, 2]",
    "terrace.families.qwen2_vl", "os.path", "..", "a:b", "- x", "#", "@", "`", "\t", "|", ">",
)  # fmt: skip
NESTED = "a:\n" + "".join(f"{' ' * n}a:\n" for n in range(1, 900))
LAUGHS = "l: &l [" + "x," * 8 + "x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 8}*{a}]\n" for a, b in ("lm", "mn", "no", "op", "pq"))
BLOCKS = (
    "a: &a\n  <<: *a\n", "x: &x [*x, *x]\n", "{" * 900 + "}" * 900 + "\n", "[" * 5000 + "\n", NESTED, LAUGHS, "<<: [1, 2]\n",
    "<<: {name: other}\n", "extends: tiny.yaml\n", "extends: [a]\n", "extends: nowhere.yaml\n", "extends: .\n",
    "---\nname: two\n", "\0", "\x07", "\ufeff", "? [a, b]\n: c\n", "? {a: b}\n: c\n", "name: again\n", "9: x\n", "null: x\n",
    "!!set {a, b}\n", "%YAML 9.9\n---\n",
)  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    """The recipe's text with one to four changes: of a value, a key, a line, an indentation, some characters, or a foreign block."""
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        place = rng.randrange(len(lines))
        line = lines[place]
        match rng.randrange(9):
            case 0:
                lines[place] = re.sub(r":.*", lambda _: f": {rng.choice(ODD)}", line)
            case 1:
                words = re.findall(r"[\w.+-]+", line) or ["x"]
                lines[place] = line.replace(rng.choice(words), rng.choice(ODD), 1)
            case 2:
                del lines[place]
            case 3:
                lines.insert(place, rng.choice(lines))
            case 4:
                lines[place] = " " * rng.randint(0, 6) + line.lstrip()
            case 5:
                cut = rng.randint(0, len(line))
                lines[place] = line[:cut] + rng.choice([*"{}[]:,&*!|>'\"%@`#-?~\t", "\0", "\u0085", "é"]) + line[cut:]
            case 6:
                lines.insert(place, rng.choice(BLOCKS))
            case 7:
                other = rng.randrange(len(lines))
                lines[place], lines[other] = lines[other], line
            case _:
                lines = lines[: max(1, place)]
        text = "\n".join(lines)
    return text


def check(text: str, folder: Path) -> bool:
    """Load a text as a recipe file. True: it is one."""
    file = folder / "mutant.yaml"
    file.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    started = time.process_time()
    recipe, refused = None, None
    try:
        recipe = load_recipe(file)
    except RecipeError as error:
        refused = error
    assert time.process_time() - started < 10, text
    if recipe is None:
        assert refused.problems
        for problem in refused.problems:
            assert problem.place is not None, str(refused)
            assert problem.place.file.endswith(".yaml")
            whole = any(words in problem.message for words in ("cannot read the recipe", "not valid YAML"))
            assert problem.place.line is not None or whole, problem
        return False
    questions(recipe)
    again = parse_recipe(recipe.model_dump(mode="json"))
    assert recipe_hash(again) == recipe_hash(recipe)
    assert stage_hash(recipe, 0)
    dump_recipe(recipe)
    return True


def run(count: int, seed: int, folder: Path, base: Path = TINY) -> int:
    (folder / "tiny.yaml").write_text(TINY.read_text())
    rng, text, valid = random.Random(seed), base.read_text(), 0
    for number in range(count):
        mutant = mutated(text, rng)
        try:
            valid += check(mutant, folder)
        except BaseException as error:
            kept = folder / f"found-{number}.yaml"
            kept.write_bytes(mutant.encode("utf-8", errors="surrogatepass"))
            raise AssertionError(f"mutant {number} of {base.name}, seed {seed} ({kept}): {type(error).__name__}: {error}") from error
    return valid


def test_mutants_are_read_or_refused(tmp_path):
    valid = run(250, 1, tmp_path)
    assert 5 < valid < 245  # the mutations neither break everything nor nothing


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_mutants_are_read_or_refused(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(10_000, 2, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mutants_of_every_shipped_recipe_are_read_or_refused(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = shipped.names()
    assert len(names) > 20
    for seed, name in enumerate(names):
        run(100, seed, tmp_path, shipped.recipe_file(Path(name)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: x\na: &a\n  b: 1\n  <<: *a\n", 2, "merges a map into itself"),
        ("name: x\n" + "".join(f"{' ' * n}a:\n" for n in range(900)), 66, "nested more than 64"),
        ("name: x\nmodel: " + "{a: " * 900 + "1" + "}" * 900, 2, "nested more than 64"),
        (f"name: x\nmodel:\n  seed: {'9' * 5000}\n", 3, "a number of 5,000 characters"),
        ("name: x\nmodel:\n  a\0b: 1\n", 3, "U+0000"),
        ('name: x\nmodel:\n  pretrained: "a\\0b"\n', 3, "U+0000"),
        ('name: x\ndescription: "\\ud800"\n', 2, "Unicode"),
        ("name: x\nstages: !!set {a, b}\n", 2, "tag"),
    ],
)
def test_corners_of_yaml_are_refused_by_line(text, line, words, tmp_path):
    file = tmp_path / "corner.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as found:
        load_recipe(file)
    assert any(problem.place.line == line and words in problem.message for problem in found.value.problems), str(found.value)[:500]


@pytest.mark.parametrize("name", [".nan", "..", "a..b", "1.5.x", "os.path", "' .a'"])
def test_names_of_modules_that_hold_no_family_are_refused_by_line(name, tmp_path):
    file = tmp_path / "corner.yaml"
    file.write_text(TINY.read_text().replace("architecture: qwen2_5_vl", f"architecture: {name}"))
    with pytest.raises(RecipeError) as found:
        load_recipe(file)
    assert any(problem.place.line == 7 and "cannot be used as a family" in problem.message for problem in found.value.problems)
