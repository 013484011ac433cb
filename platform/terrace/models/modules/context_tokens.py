"""LLaMA-VID's two kinds of tokens: what a picture says to the question (context), and what is in it anyway (content).

A Q-Former reads picture and question into queries; each of them attends over the picture's patches, and the mean of what they find is the
context token. The content tokens are the patches, averaged over the cells of a grid, through an MLP of their own.

Shape letters: N pictures, P patches, W width of the tower, T tokens of the question, Q queries, D width of the Q-Former, H of the
language model, c content tokens along a side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel


class ContextContent(nn.Module):
    """-> [N, 1 + c * c, H]: the context token, then the content tokens row by row."""

    def __init__(self, former: Any, queries: int, content_side: int, vision_width: int, width: int) -> None:
        super().__init__()
        self.content_side = content_side
        self.q_former = InstructBlipQFormerModel(former)
        self.query = nn.Parameter(torch.empty(1, queries, former.hidden_size))
        self.text_proj = nn.Linear(former.hidden_size, vision_width)
        self.key_proj = nn.Linear(vision_width, vision_width)
        self.value_proj = nn.Linear(vision_width, width)
        self.linear_1, self.linear_2 = nn.Linear(vision_width, width), nn.Linear(width, width)

    def forward(self, features: torch.Tensor, normed: torch.Tensor, question: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """`features` [N, 1 + P, W] with a class token in front, and as the Q-Former reads them, `normed`; the question's ids [N, T], and
        which of them are read (1) or filled up (0)."""
        query = self.query.expand(len(features), -1, -1)
        mask = torch.cat([read.new_ones(query.shape[:2]), read], dim=1)
        seen = self.q_former(input_ids=question, attention_mask=mask, query_embeds=query, encoder_hidden_states=normed).last_hidden_state
        asked, patches = self.text_proj(seen[:, : query.shape[1]]), features[:, 1:]
        scores = asked @ self.key_proj(patches).transpose(1, 2) / patches.shape[-1] ** 0.5
        context = self.value_proj((scores.softmax(dim=-1) @ patches).mean(dim=1, keepdim=True))
        across = round(patches.shape[1] ** 0.5)
        cell = across // self.content_side
        cells = patches.unflatten(1, (self.content_side, cell, self.content_side, cell)).mean(dim=(2, 4)).flatten(1, 2)
        return torch.cat([context, self.linear_2(nn.functional.gelu(self.linear_1(cells)))], dim=1)
