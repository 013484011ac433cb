"""Suites for models that give vectors: zero-shot classes, retrieval, nearest neighbours, a linear probe.

Nothing is generated. Each worker turns what a case is compared with (all captions, all classes, all other pictures of the suite)
into vectors by itself, so a case's figures are the same on any number of workers. Neighbours and the probe ask the picture's
features alone: they measure an encoder that never saw a text.

Shape letters: N pictures of the suite, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from terrace.data.images import load_pixels
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.errors import InputError
from terrace.evaluate.cases import Case
from terrace.evaluate.model_files import model_sight
from terrace.families.interface import Sight
from terrace.models.batch import ImageFacts
from terrace.models.build import directory_config, materialise, meta_model
from terrace.models.families.registry import family_of_model
from terrace.models.precision import DTYPES, compute_context
from terrace.models.weights import initial_weights
from terrace.objectives.retrieval import PLACES, wrong_before_right
from terrace.recipe.schema import Model as ModelSection

PROMPT = "a photo of a {}."
NEIGHBOURS, SHARPNESS = 20, 0.07  # of k-NN: each votes with exp(cosine / sharpness)
FOLDS = 5  # of the probe: a case is judged by a map that was fitted on the other folds
DECAY, STEPS = 1e-3, 100  # of the probe's fit
Measure = Callable[[Sequence[Case]], list[dict[str, float]]]


@dataclass(frozen=True)
class VectorModel:
    """A loaded model that gives vectors, or matches."""

    network: Any
    tokenizer: TextTokenizer | None
    sight: Sight
    device: str
    precision: str
    batch_size: int

    def pictures(self, cases: Sequence[Case], features: bool) -> torch.Tensor:
        """float32 [N, D], of length 1: vectors to compare with those of texts, or the encoder's own features."""
        family = family_of_model(self.network)
        give = family.image_features if features else family.image_vectors

        return self._in_batches(cases, lambda some: F.normalize(give(self.network, *self._seen(some)).float(), dim=1))

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [N, D], of length 1."""
        give = family_of_model(self.network).text_vectors
        return self._in_batches(texts, lambda some: F.normalize(give(self.network, *self._read(some)).float(), dim=1))

    def fitting(self, cases: Sequence[Case], texts: Sequence[str]) -> list[float]:
        """How well each picture and its text fit: their cosine, or the probability of a match from a model that matches."""
        family = family_of_model(self.network)
        if self.sight.family.gives == "vectors":
            return (self.pictures(cases, False) * self.texts(texts)).sum(dim=1).tolist()

        def matches(some: Sequence[tuple[Case, str]]) -> torch.Tensor:
            values, facts = self._seen([case for case, _ in some])
            seen = family.seen(self.network, family.inputs(values, facts)["pixel_values"])
            return family.match_logits(self.network, seen, *self._read([text for _, text in some])).float().softmax(dim=1)[:, 1]

        return self._in_batches(list(zip(cases, texts, strict=True)), matches).tolist()

    def _seen(self, cases: Sequence[Case]) -> tuple[torch.Tensor, ImageFacts]:
        family, views = family_of_model(self.network), [self.sight.view(case.sizes[0]) for case in cases]
        rows = [load_pixels(case.read_images()[0], self.sight.family, view) for case, view in zip(cases, views)]
        pixels = torch.from_numpy(np.concatenate(rows)).to(self.device)
        counts = [torch.tensor([getattr(view, name) for view in views]) for name in ("tokens", "rows")]
        facts = ImageFacts(torch.tensor([view.facts for view in views]), *counts)
        return family.normalised(pixels, DTYPES[self.precision]), facts

    def _read(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Token ids and mask; what does not fit is cut off, as in training."""
        assert self.tokenizer is not None, "a suite of texts was opened for a model of pictures"
        marks, data = self.tokenizer.marks(self.sight.family), self.sight.family
        start, end = [marks[role] for role in data.beginning], marks[data.end_of_text]
        room = data.context - len(start) - 1
        ids = [np.asarray([*start, *self.tokenizer.encode(text)[:room], end]) for text in texts]
        rows = family_of_model(self.network).text_rows(ids, self.network.config)
        return [torch.from_numpy(part).to(self.device) for part in rows]

    def _in_batches(self, things: Sequence[Any], find: Callable[[Sequence[Any]], torch.Tensor]) -> torch.Tensor:
        found = []
        for start in range(0, len(things), self.batch_size):
            with torch.no_grad(), compute_context(self.precision, self.device):
                found.append(find(things[start : start + self.batch_size]).cpu())
        return torch.cat(found)


def load_vector_model(
    directory: Path, device: str | None, precision: str | None, batch_size: int, pixels: tuple[int, int] | None
) -> VectorModel:
    """Load a model directory onto `device`, as `engine.load_model` does for one that answers."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or ("bf16" if device.startswith("cuda") else "fp32")
    sight = model_sight(directory)
    sight = Sight(sight.family, pixels) if pixels else sight
    config = directory_config(directory)
    skeleton = meta_model(config)
    source, _ = initial_weights(ModelSection(architecture=sight.family.name, pretrained=str(directory)), skeleton, directory)
    network = materialise(skeleton, source, device, DTYPES[precision]).eval()
    tokenizer = load_tokenizer(directory) if sight.family.gives != "pictures" else None
    return VectorModel(network, tokenizer, sight, device, precision, batch_size)


def label_of(case: Case) -> str:
    """The one text of a case."""
    if not isinstance(case.expected, str):
        raise InputError(f"case {case.id}: a picture has one text here, not {case.expected!r}")
    if len(case.images) != 1:
        raise InputError(f"case {case.id}: it has {len(case.images)} pictures; a case of vectors has one")
    return case.expected


def vector_measure(kind: str, cases: Sequence[Case], model: VectorModel) -> Measure:
    """A function from cases of a suite to their figures. `cases` are all of the suite."""
    labels = [label_of(case) for case in cases]
    classes = list(dict.fromkeys(labels))
    numbers = torch.tensor([classes.index(label) for label in labels])
    places = {case.id: place for place, case in enumerate(cases)}
    if kind == "zero_shot":
        scores = model.pictures(cases, False) @ model.texts([PROMPT.format(name) for name in classes]).T
        right = [_right(scores, numbers, most) for most in (1, 5)]
        figures = [{"accuracy": first, "accuracy_of_5": five} for first, five in zip(*right)]
    elif kind == "retrieval":
        images, texts, own = model.pictures(cases, False), model.texts(classes), torch.arange(len(classes))
        to_text = wrong_before_right(images, numbers, texts, own)
        to_image = wrong_before_right(texts, own, images, numbers)[numbers]
        figures = [
            {f"{name}_r{place}": float(rank < place) for name, rank in zip(("image_to_text", "text_to_image"), ranks) for place in PLACES}
            for ranks in zip(to_text.tolist(), to_image.tolist())
        ]
    else:
        features = model.pictures(cases, True)
        votes = _neighbours(features, numbers, len(classes)) if kind == "knn" else _probe(features, numbers, len(classes))
        figures = [{"accuracy": right} for right in _right(votes, numbers, 1)]
    return lambda some: [figures[places[case.id]] for case in some]


def _right(scores: torch.Tensor, wanted: torch.Tensor, most: int) -> list[float]:
    """1.0 where the wanted class is among the `most` best; a wrong class that is as good counts as better."""
    best = scores.gather(1, wanted[:, None])
    before = (scores >= best).sum(1) - 1
    return (before < most).double().tolist()


def _neighbours(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """[N, C]: votes of the nearest other pictures."""
    nearness = features @ features.T
    nearness.fill_diagonal_(-torch.inf)
    near, places = nearness.topk(min(NEIGHBOURS, len(features) - 1), dim=1)
    return torch.zeros(len(features), classes).scatter_add_(1, labels[places], (near / SHARPNESS).exp())


def _probe(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """[N, C]: logits of a linear map that never saw the picture's fold, fitted by L-BFGS on standardised features."""
    found = torch.zeros(len(features), classes, dtype=torch.float64)
    folds = torch.from_numpy(np.random.default_rng(0).permutation(len(features))) % FOLDS  # rows may come class by class
    for fold in range(FOLDS):
        inside, outside, values = folds == fold, folds != fold, features.double()
        values = (values - values[outside].mean(0)) / values[outside].std(0).clamp_min(1e-6)
        weight = torch.zeros(classes, values.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        fit = torch.optim.LBFGS([weight], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            fit.zero_grad()  # noqa: B023
            logits = values[outside] @ weight[:, :-1].T + weight[:, -1]  # noqa: B023
            total = F.cross_entropy(logits, labels[outside]) + DECAY * weight[:, :-1].square().sum()  # noqa: B023
            total.backward()
            return total

        fit.step(loss)
        with torch.no_grad():
            found[inside] = values[inside] @ weight[:, :-1].T + weight[:, -1]
    return found
