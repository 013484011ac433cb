"""Rules about `recaption`: its source, and which models it needs."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.errors import nearest
from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import Recipe

KINDS = ("caption", "picture")


def check(recipe: Recipe) -> Iterator[Problem]:
    places: dict[str, str] = {}
    for name, wanted in recipe.recaption.items():
        at: Path = ("recaption", name)
        source = recipe.data.sources.get(wanted.source)
        if source is None:
            yield Problem((*at, "source"), f"there is no source {wanted.source}{nearest(wanted.source, recipe.data.sources)}")
        elif source.kind not in KINDS:
            yield Problem((*at, "source"), f"{wanted.source} is of kind {source.kind}; captions are written for {' and '.join(KINDS)}")
        elif source.kind == "picture" and "own" in wanted.texts:
            yield Problem((*at, "texts"), f"pictures of {wanted.source} have no text of their own; write texts: [written]")
        if len(set(wanted.texts)) < len(wanted.texts):
            yield Problem((*at, "texts"), "says the same twice")
        if ("written" in wanted.texts) != (wanted.captioner is not None):
            told = "nobody writes them: name a model directory" if wanted.captioner is None else "texts do not have what it writes"
            yield Problem((*at, "captioner"), told)
        if wanted.filter is not None and wanted.threshold is None:
            yield Problem((*at, "threshold"), "say from which value of the filter on a caption is kept")
        if wanted.filter is None and wanted.threshold is not None:
            yield Problem((*at, "filter"), "a threshold is nothing without a model that judges")
        if wanted.filter is None and "written" not in wanted.texts:
            yield Problem((*at, "filter"), "without it the source's own captions would only be copied")
        if not wanted.out.strip():
            yield Problem((*at, "out"), "is empty; name a folder or an s3:// URI")
        if (other := places.setdefault(wanted.out.rstrip("/"), name)) != name:
            yield Problem((*at, "out"), f"{other} writes there already")
