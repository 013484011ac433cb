"""Rules about sources, and where files may lie: in folders and on S3. Every other address is named before anything is asked of it."""

from __future__ import annotations

from collections.abc import Iterator

from terrace.recipe.errors import Path, Problem
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_model import FROM_STAGE, Model

READ = ("s3", "file")
INSTEAD = {
    "gs": "Google's storage speaks S3 at https://storage.googleapis.com (data.storage.endpoint_url, with HMAC keys), or copy it",
    "hf": "fetch it first: hf download NAME --local-dir FOLDER",
    "http": "fetch it first", "https": "fetch it first; of a hub: hf download NAME --local-dir FOLDER",
}  # fmt: skip


def check(recipe: Recipe) -> Iterator[Problem]:
    """A problem for each file or folder with an address that nobody reads, and for sources of which nothing is left."""
    yield from _sources(recipe)
    for path, uri in named_places(recipe):
        scheme, mark, _ = uri.partition("://")
        if mark and scheme.lower() not in READ:
            instead = INSTEAD.get(scheme.lower(), "copy it there")
            yield Problem(path, f"{scheme}:// is not read here, only folders and s3:// are: {instead}")


def _sources(recipe: Recipe) -> Iterator[Problem]:
    for name, source in recipe.data.sources.items():
        at: Path = ("data", "sources", name)
        if not source.uri.strip():
            yield Problem((*at, "uri"), "is empty; name a folder, a file, a glob or an s3:// URI")
        if source.max_samples is not None and source.holdout_samples >= source.max_samples:
            yield Problem(
                (*at, "holdout_samples"),
                f"holds out {source.holdout_samples} of at most {source.max_samples} samples: none is left to train on",
            )
        if source.holdout_samples and source.holdout_share:
            yield Problem((*at, "holdout_share"), "holdout_samples says a number already; keep one of the two")


def written_models(recipe: Recipe) -> Iterator[tuple[Path, Model]]:
    """The recipe's model and those that stages bring, each with its key."""
    yield ("model",), recipe.model
    for index, stage in enumerate(recipe.stages):
        if stage.model is not None:
            yield ("stages", index, "model"), stage.model


def named_places(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """(key, URI) of every file or folder that a recipe reads."""
    for at, model in written_models(recipe):
        if model.pretrained is not None:
            yield (*at, "pretrained"), model.pretrained
        for part, place in model.init or ():
            if place != "random" and not place.startswith(FROM_STAGE):
                yield (*at, "init", part), place
    if recipe.tokenizer.path is not None:
        yield ("tokenizer", "path"), recipe.tokenizer.path
    for name, source in recipe.data.sources.items():
        yield ("data", "sources", name, "uri"), source.uri
        if source.images_root is not None:
            yield ("data", "sources", name, "images_root"), source.images_root
    for index, stage in enumerate(recipe.stages):
        for place, suite in enumerate(stage.evaluate.suites):
            yield ("stages", index, "evaluate", "suites", place), suite.partition(":")[2]
    for name, wanted in recipe.recaption.items():
        yield ("recaption", name, "out"), wanted.out
