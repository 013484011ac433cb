"""What does not exist is refused before anything slow is loaded: one line, status 2, and neither torch nor Ray nor transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LINES = [
    "init mine --from nowhere --data x", "chat nowhere", "serve nowhere", "export nowhere out", "run nowhere.yaml --run-dir r",
    "run rows.jsonl --run-dir r", "status nowhere", "report nowhere", "track nowhere --uri http://127.0.0.1:1", "logs nowhere",
    "resume nowhere", "cancel nowhere", "demo --data nowhere --run-dir r", "validate nowhere.yaml", "validate rows.jsonl",
    "plan nowhere.yaml", "order nowhere.yaml one", "inspect nowhere.jsonl --out p.html", "ingest nowhere.jsonl",
    "index nowhere.yaml", "evaluate nowhere mmbench:x.tsv", "recipes show nowhere", "duplicates nowhere.yaml",
]  # fmt: skip
SCRIPT = """
import contextlib, io, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "ray", "transformers"):
            raise AssertionError(f"{name} is loaded")

sys.meta_path.insert(0, Refuse())
from terrace import cli
for line in sys.argv[1:]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = cli.main(line.split())
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    print(status, len(said.getvalue().strip().splitlines()), line, "|", said.getvalue().strip().replace("\\n", " / "), sep="\\t")
"""


def test_wrong_names_are_refused_before_anything_slow_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    done = subprocess.run([sys.executable, "-c", SCRIPT, *LINES], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    answers = done.stdout.splitlines()
    assert len(answers) == len(LINES)
    assert [answer for answer in answers if not answer.startswith("2\t1\t")] == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl"], "nothing is left behind"
    assert all("`terrace init DIR --from CHECKPOINT --data rows.jsonl`" in answer for answer in answers if "\trun rows.jsonl" in answer)
