"""The losses of BLIP-2's first stage, and which pairs are told apart. Pure functions of tensors.

With S[i, j] = max over queries q of picture i of x_iq . y_j, divided by the temperature t, and e the label smoothing:

    itc  = 1/2 sum over pairs i of [ CE_e(S[i, :], i) + CE_e(S[:, i], i) ]
    itm  = CE(match(i, i), 1) + CE(match(i, text n_i), 0) + CE(match(picture m_i, i), 0), a mean over all that there are
    itg  = CE_e of each token after those before it, a mean over tokens

n_i and m_i are drawn with probabilities softmax(S[i, :]) and softmax(S[:, i]) among the pairs whose text is another.

Shape letters: N pairs of all ranks, n those of this rank, Q queries, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

ROWS_AT_ONCE = 2**26  # numbers of a block of similarities


@dataclass(frozen=True)
class Share:
    """Of some pairs their part of the contrastive loss, and its slopes: of their vectors, and of the temperature through each."""

    loss: torch.Tensor  # [n]
    images: torch.Tensor  # [n, Q, D]
    texts: torch.Tensor  # [n, D]
    temperature: torch.Tensor  # [n]

    def part(self, start: int, stop: int) -> Share:
        return Share(self.loss[start:stop], self.images[start:stop], self.texts[start:stop], self.temperature[start:stop])


def similarities(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """[N, M]: of pictures [N, Q, D] the nearest query to each of texts [M, D]."""
    rows = max(1, ROWS_AT_ONCE // max(1, images.shape[1] * len(texts)))
    return torch.cat([torch.einsum("nqd,md->nmq", block, texts).amax(-1) for block in images.split(rows)])


def contrast(
    images: torch.Tensor, texts: torch.Tensor, temperature: torch.Tensor, smoothing: float, own: slice
) -> tuple[Share, torch.Tensor]:
    """The share of the pairs `own` in the loss of all pairs [N, ...], and S [N, N]."""
    with torch.no_grad():
        logits = similarities(images, texts) / temperature
        count, places = len(logits), torch.arange(len(logits), device=logits.device)
        target = torch.full_like(logits, smoothing / max(1, count))
        target[places, places] += 1.0 - smoothing
        rows, columns = logits.log_softmax(1), logits.log_softmax(0)
        loss = -0.5 * ((target * rows).sum(1) + (target * columns).sum(0))
        slope = 0.5 * (rows.exp() - target + columns.exp() - target)
        of_temperature = -(slope * logits).sum(1) / temperature
    of_images = _slopes(images[own], texts, slope[own] / temperature, True)
    of_texts = _slopes(images, texts[own], slope[:, own] / temperature, False)
    return Share(loss[own], of_images, of_texts, of_temperature[own]), logits


def _slopes(images: torch.Tensor, texts: torch.Tensor, weights: torch.Tensor, of_images: bool) -> torch.Tensor:
    """What sum(weights * similarities(images, texts)) changes by with the pictures, or with the texts."""
    total = torch.zeros_like(images if of_images else texts)
    rows = max(1, ROWS_AT_ONCE // max(1, images.shape[1] * len(texts)))
    for start in range(0, len(images), rows):
        block = slice(start, start + rows)
        with torch.enable_grad():
            leaf = (images[block] if of_images else texts).detach().requires_grad_(True)
            left, right = (leaf, texts) if of_images else (images[block], leaf)
            value = (torch.einsum("nqd,md->nmq", left, right).amax(-1) * weights[block]).sum()
            [found] = torch.autograd.grad(value, leaf)
        if of_images:
            total[block] = found
        else:
            total += found
    return total


def drawn_negatives(logits: torch.Tensor, same: np.ndarray, order: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] and [N]: for each pair another's text, and another's picture; -1 where every text is its own.

    `same` bool [N, N]: pairs of one text. `order` int64 [N] numbers the pairs as the data does, so that no layout changes a draw;
    `draws` [N, 2] in [0, 1).
    """
    values = logits.detach().double().cpu().numpy()[np.ix_(order, order)]
    same, back = same[np.ix_(order, order)], np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    found = []
    for side, matrix in ((0, values), (1, values.T)):
        weights = np.exp(matrix - matrix.max(axis=1, keepdims=True, initial=-np.inf))
        weights = np.where(same, 0.0, np.maximum(weights, 1e-12))  # a text as unlike as can be is still another
        sums = weights.cumsum(axis=1)
        wanted = draws[order, side] * sums[:, -1] if len(sums) else np.zeros(0)
        place = np.asarray([np.searchsorted(row, value, side="right") for row, value in zip(sums, wanted)], np.int64)
        place = np.minimum(place, len(order) - 1)
        chosen = np.where(sums[:, -1] > 0, order[place], -1) if len(sums) else np.zeros(0, np.int64)
        found.append(chosen[back])
    return found[0], found[1]


def smoothed(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """[T]: cross-entropy of each row [T, words], of which `smoothing` is spread over all words."""
    scores = logits.log_softmax(-1)
    right = scores.gather(-1, targets[:, None])[:, 0]
    return -(1.0 - smoothing) * right - smoothing * scores.mean(-1)
