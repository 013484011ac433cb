"""A damaged picture among a run's rows: who starts the run is told, and so is whoever asks about it later."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from terrace.curriculum.journal import Journal
from terrace.curriculum.report_command import collect_run
from terrace.curriculum.run import prepare_run_data
from terrace.curriculum.run_directory import store_recipe
from terrace.curriculum.status import print_status, run_status
from terrace.recipe.loading import load_recipe
from terrace.recipe.schema import Recipe
from terrace.track.progress import Display
from terrace.track.report.tables import events_table

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"


def recipe_over(rows: Path, damaged: bool) -> Recipe:
    """The tiny recipe's first stage over twelve captions, the pictures of the fourth and fifth of which may be noise."""
    rows.mkdir()
    for number in range(12):
        Image.new("RGB", (60, 40), (20 * number, 0, 90)).save(rows / f"{number}.png")
    if damaged:
        (rows / "3.png").write_bytes(b"no picture at all")
        (rows / "4.png").unlink()
    lines = [{"id": f"row-{number}", "image": f"{number}.png", "text": f"A picture of shade {number}."} for number in range(12)]
    (rows / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"uri": str(rows / "rows.jsonl"), "kind": "caption", "holdout_samples": 2}
    recipe = load_recipe(TINY).model_dump(mode="json")
    recipe |= {"data": {"sources": {"captions": source}}, "stages": recipe["stages"][:1], "tokenizer": {"train_vocabulary_size": 400}}
    return Recipe.model_validate(recipe)


@pytest.mark.parametrize("damaged", [True, False])
def test_what_was_refused_is_said_by_the_run_its_journal_status_and_report(damaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe, run_dir, output = recipe_over(tmp_path / "rows", damaged), tmp_path / "run", io.StringIO()
    run_dir.mkdir()
    facts = prepare_run_data(recipe, run_dir, Display(output, terminal=False))
    store_recipe(run_dir, recipe)
    with Journal(run_dir) as journal:
        journal.append({"event": "run_started"})
        journal.append({"event": "data_prepared", **facts})
    print_status(run_status(run_dir))
    told = {
        "run": output.getvalue(), "status": capsys.readouterr().out, "report": events_table(collect_run(run_dir)),
        "journal": (run_dir / "journal.jsonl").read_text(),
    }  # fmt: skip
    sentence = "captions: 2 of 12 samples left out, refused ("
    assert {name: sentence in text for name, text in told.items()} == dict.fromkeys(told, damaged)
    assert facts["sources"] == {"captions": 10 if damaged else 12}
    assert run_status(run_dir)["refused"] == facts.get("refused", {})
    if damaged:
        assert facts["refused"] == {"captions": {"not_an_image": 1, "missing_image": 1}}
        listed = Path(told["run"].partition("each is named in ")[2].partition("\n")[0])
        assert {json.loads(line)["id"] for line in listed.read_text().splitlines()} == {"row-3", "row-4"}
