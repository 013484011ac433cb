"""Small files in the forms that other trainers' users have, through `terrace ingest`, `inspect` and a run of five steps."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from e2e_runs import RECIPE, REPOSITORY, environment
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "black", "orange", "purple")


def picture(number: int) -> bytes:
    image = Image.new("RGB", (84, 56), "white")
    ImageDraw.Draw(image).rectangle((10, 10, 40, 40), fill=COLOURS[number % len(COLOURS)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def rows() -> dict[str, list[dict[str, Any]]]:
    """12 rows in each form."""
    names = ("alpaca", "sharegpt", "kto", "swift", "qwen", "trl", "dpo", "finevision")
    forms: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(12):
        colour, image = COLOURS[number % len(COLOURS)], f"{number}.png"
        ask, say = "Which colour has the square?", f"It is {colour}, number {number}."
        forms["alpaca"].append({"instruction": ask, "input": f"Square {number}.", "output": say, "images": [image]})
        forms["sharegpt"].append({"conversations": [{"from": "human", "value": f"<image>{ask}"}, {"from": "gpt", "value": say}],
                                  "images": [image], "system": "Be brief.", "tools": "[]"})  # fmt: skip
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        forms["kto"].append({"messages": turns, "label": number % 2 == 0})
        forms["swift"].append({"messages": [{"role": "user", "content": "<image>Where is the <ref-object>?"},
                                            {"role": "assistant", "content": "At <bbox>.", "loss": True}], "images": [image],
                               "objects": {"ref": ["square"], "bbox": [[10, 10, 41, 41]]}})  # fmt: skip
        forms["qwen"].append({"messages": [{"role": "user", "content": [{"type": "image", "image": image},
                                                                         {"type": "text", "text": ask}]},
                                           {"role": "assistant", "content": [{"type": "text", "text": say}]}]})  # fmt: skip
        forms["trl"].append({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ask}]}], "images": [image],
                             "completion": [{"role": "assistant", "content": [{"type": "text", "text": say}]}]})  # fmt: skip
        forms["dpo"].append({"prompt": [{"role": "user", "content": ask}], "chosen": [{"role": "assistant", "content": say}],
                             "rejected": [{"role": "assistant", "content": "I do not know."}]})  # fmt: skip
        forms["finevision"].append({"images": [{"bytes": picture(number), "path": None}], "source": "drawn",
                                    "texts": [{"user": ask, "assistant": say}], "relevance_ratings": [5], "relevance_min": 5})  # fmt: skip
    return forms


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's model over the files, in one stage."""
    folder = tmp_path_factory.mktemp("forms")
    forms = rows()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "alpaca.json").write_text(json.dumps(forms["alpaca"], indent=1))
    (folder / "sharegpt.json").write_text(json.dumps(forms["sharegpt"]))
    columns = {"messages": "conversations", "images": "images", "system": "system", "tools": "tools"}
    entries = {
        "alpaca": {"file_name": "alpaca.json"},
        "sharegpt": {"file_name": "sharegpt.json", "formatting": "sharegpt", "columns": columns},
    }
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    for name in ("kto", "swift", "qwen", "trl", "dpo"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in forms[name]))
    pq.write_table(pa.Table.from_pylist(forms["finevision"]), folder / "finevision.parquet")
    sources = {path.stem: {"uri": str(path), "kind": "qa"} for path in sorted(folder.glob("*.jsonl"))}
    sources["swift"]["kind"] = "grounding"
    sources["finevision"] = {"uri": str(folder / "finevision.parquet"), "kind": "qa"}
    sources["llama_factory"] = {"uri": str(folder / "dataset_info.json"), "kind": "qa"}
    base = yaml.safe_load(RECIPE.read_text())
    stage = {**base["stages"][0], "name": "forms", "mixture": dict.fromkeys(sources, 1.0), "budget": {"steps": 5}}
    recipe = {**base, "name": "forms", "data": {"sources": sources}, "stages": [stage]}
    path = folder / "forms.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def terrace(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "terrace.cli", *words], env=environment(), capture_output=True, text=True, timeout=900,
                          cwd=REPOSITORY)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return done.stdout


@pytest.mark.slow
def test_every_form_is_ingested_looked_at_and_trained(recipe: Path) -> None:
    run = recipe.parent / "run"
    told = terrace("ingest", str(recipe), "--run-dir", str(run))
    for name, count in {"kto": 6, "swift": 12, "qwen": 12, "trl": 12, "dpo": 12, "finevision": 12, "llama_factory": 24}.items():
        assert f"{name}: {count} samples" in told
    assert told.count("unwanted_answer") == 1
    page = recipe.parent / "page.html"
    terrace("inspect", f"{recipe}:forms", "--run-dir", str(run), "--samples", "14", "--out", str(page))
    shown = re.sub(r"<[^>]+>", "", page.read_text())
    assert sum(shown.count(f"It is {colour}, number") for colour in COLOURS) >= 10
    terrace("run", str(recipe), "--run-dir", str(run))
    [metrics] = run.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line or "train/loss" in line]
    assert len(steps) >= 5
