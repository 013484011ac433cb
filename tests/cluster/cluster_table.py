"""Results of the suite on a real cluster as a table: `python tests/cluster/cluster_table.py JUNIT.xml OUT.md`."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def table(junit: str) -> str:
    """Markdown: one line per test, with why it was skipped or how it failed."""
    lines = ["| test | result | seconds | |", "|---|---|---|---|"]
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = (case.get("name") or "").removeprefix("test_").partition("[")[0].replace("_", " ")
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        result = {None: "passed", "failure": "FAILED", "error": "FAILED", "skipped": "skipped"}[found.tag if found is not None else None]
        note = next((entry.get("value") for entry in case.iter("property") if entry.get("name") == "note"), "")
        why = " ".join((found.get("message") or "").split())[:160].replace("|", "\\|") if found is not None else note
        lines.append(f"| {name} | {result} | {float(case.get('time') or 0):.0f} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(table(Path(sys.argv[1]).read_text(encoding="utf-8")), encoding="utf-8")
