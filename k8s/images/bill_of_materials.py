"""The Python packages of an image as a CycloneDX 1.6 bill of materials: `python bill_of_materials.py NAME VERSION > bom.json`.

Standard library only: it runs in the very environment that it describes. What the base image brings (Debian's packages) is not in it; its
own bill comes with the base image.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from typing import Any


def component(found: importlib.metadata.Distribution) -> dict[str, Any]:
    """One installed distribution; its name as package indexes write it."""
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    identity = f"pkg:pypi/{name}@{found.version}"
    shown = {"type": "library", "name": name, "version": found.version, "purl": identity, "bom-ref": identity}
    license_text = (found.metadata.get("License-Expression") or found.metadata.get("License") or "").strip()
    if license_text and "\n" not in license_text:  # some packages have the whole text there
        shown["licenses"] = [{"license": {"name": license_text[:200]}}]
    return shown


def bill(name: str, version: str, installed: list[importlib.metadata.Distribution]) -> dict[str, Any]:
    components = {part["bom-ref"]: part for part in map(component, installed)}
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
        "metadata": {"component": {"type": "container", "name": name, "version": version, "bom-ref": f"{name}@{version}"}},
        "components": [components[key] for key in sorted(components)],
    }  # fmt: skip


if __name__ == "__main__":
    json.dump(bill(sys.argv[1], sys.argv[2], list(importlib.metadata.distributions())), sys.stdout, indent=1)
