"""Nobody but the two family folders knows what a model is made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from terrace.errors import InputError
from terrace.families.registry import built_in, family_class

PACKAGE = Path(__file__).resolve().parents[2] / "platform" / "terrace"
KNOWN_ONLY_THERE = {
    "patch size": r"patch_size|PATCH_SIZE|\b14\s*\*\s*14\b|\b588\b|\b1176\b",
    "merge size": r"merge_size|MERGE_SIZE|\b28\s*\*\s*28\b|\b784\b|\bGRID_PIXELS\b",
    "image placeholders": r"image_pad|video_pad|vision_start|vision_end|<image_soft|IMG_CONTEXT",
    "marks of turns": r"<\|im_(start|end)\|>|<\|endoftext\|>",
    "names of parameters": r"model\.visual|vision_tower|multi_modal_projector|\.visual\.|language_model\.(layers|embed)",
    "names of families": r"qwen2_vl|qwen3_vl|\binternvl\b",
}
# What a pattern may mean elsewhere, each with its reason.
ALLOWED = {
    ("recipe/schema_model.py", "names of families"),  # the default architecture
}


def lines() -> list[tuple[str, str]]:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        if not place.startswith(("families/", "models/families/", "models/modules/")):
            found += [(place, line) for line in file.read_text(encoding="utf-8").split("\n")]
    return found


@pytest.mark.parametrize("subject", KNOWN_ONLY_THERE)
def test_it_is_known_in_the_family_folders_alone(subject: str) -> None:
    pattern = re.compile(KNOWN_ONLY_THERE[subject])
    told = [f"{place}: {line.strip()}" for place, line in lines() if pattern.search(line) and (place, subject) not in ALLOWED]
    assert not told, "\n".join(told)


def test_a_family_is_two_files_of_one_name() -> None:
    models = {file.stem for file in (PACKAGE / "models" / "families").glob("*.py")}
    assert set(built_in()) <= models
    assert models - set(built_in()) == {"__init__", "interface", "registry", "two_towers", "text_encoder", "crossing", "own_code"}


def test_a_family_that_leaves_something_out_is_refused_by_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "half.py").write_text(
        "from terrace.families.llava import Llava\nfrom terrace.families.interface import Family\n"
        "class Half(Family):\n    name = 'half'\n    view = Llava.view\n    row_values = unit = 3\nFAMILY = Half\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"extension\.half cannot be used as a family: Half does not say .*pixels.*tower_pictures, turn$"):
        family_class("extension.half")
    with pytest.raises(InputError, match=r"unknown family 'half'; there are .*internvl, .*llava"):
        family_class("half")


def test_no_file_is_longer_than_one_reading() -> None:
    long = {file.relative_to(PACKAGE).as_posix(): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in long.items() if count > 400} == {}
