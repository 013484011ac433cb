"""Where the vectors of pictures go among the embeddings of a pack."""

from __future__ import annotations

import torch

from terrace.models.families.interface import placed


def test_by_index_as_by_mask():
    embeddings, vectors = torch.randn(1, 9, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    places = torch.isin(torch.arange(9), torch.tensor([2, 3, 7])).unsqueeze(0)
    weights = torch.randn(1, 9, 4)
    found = []
    for made in (placed(embeddings, places, vectors), embeddings.masked_scatter(places.unsqueeze(-1), vectors)):
        found.append((made, *torch.autograd.grad((made * weights).sum(), (embeddings, vectors))))
    for one, other in zip(*found):
        assert torch.equal(one, other)
    more = torch.cat([vectors, torch.ones(2, 4)])  # of which no place takes the last two
    assert torch.equal(placed(embeddings, places, more), placed(embeddings, places, vectors))
