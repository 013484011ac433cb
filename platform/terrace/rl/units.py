"""From scored groups to packs of the policy step: units laid out, dealt to ranks by cost, and moved to the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from terrace.data.order.balance import deal
from terrace.data.types import PackedExample, PromptInputs, following_positions, joined_pixels, no_pixels
from terrace.generation.interface import Prompt, Response
from terrace.models.batch import to_device
from terrace.models.shared_prompt import Unit
from terrace.objectives.grpo import PolicyBatch, response_rows


@dataclass(frozen=True)
class TrainGroup:
    """A prompt with the responses that take part in the update, and one advantage for each."""

    prompt: Prompt
    responses: tuple[Response, ...]
    advantages: tuple[float, ...]

    @property
    def rows(self) -> int:
        """Rows of the pack that this group takes."""
        return len(self.prompt.input_ids) + sum(len(response.tokens) - 1 for response in self.responses)

    @property
    def response_tokens(self) -> int:
        """Tokens that the policy said: those that train."""
        return sum(len(response.sampled_tokens) for response in self.responses)


def pack_groups(groups: Sequence[TrainGroup], sequence_length: int) -> list[list[TrainGroup]]:
    """Groups in order into packs of at most `sequence_length` rows. A group that is longer alone is split, its prompt
    computed again in each part; only a single response that is too long with its prompt makes a longer pack."""
    packs: list[list[TrainGroup]] = []
    filled = sequence_length + 1
    for group in (part for whole in groups for part in split_group(whole, sequence_length)):
        if filled + group.rows > sequence_length:
            packs.append([])
            filled = 0
        packs[-1].append(group)
        filled += group.rows
    return packs


def split_group(group: TrainGroup, sequence_length: int) -> list[TrainGroup]:
    """The group, or parts of its responses that fit `sequence_length` rows with the prompt: the loss is a sum over
    responses, so a part more or less only costs its prompt."""
    if group.rows <= sequence_length:
        return [group]
    parts: list[list[int]] = []
    filled = sequence_length + 1
    for place, response in enumerate(group.responses):
        if filled + len(response.tokens) - 1 > sequence_length:
            parts.append([])
            filled = len(group.prompt.input_ids)
        parts[-1].append(place)
        filled += len(response.tokens) - 1
    return [
        TrainGroup(
            group.prompt,
            tuple(group.responses[place] for place in part),
            tuple(group.advantages[place] for place in part),
        )
        for part in parts
    ]


def group_cost(prompt_tokens: int, visual_tokens: int, response_tokens: int) -> float:
    """Relative work of a group: rows, attention of the responses to the prompt, and images."""
    rows = prompt_tokens + response_tokens
    return rows + prompt_tokens * (rows + response_tokens) / 16_384 + visual_tokens


def deal_groups(costs: Sequence[float], world_size: int, rank: int) -> list[int]:
    """Numbers of this rank's groups: as equal in count as possible, balanced by cost, agreed on by every rank."""
    whole = len(costs) // world_size * world_size
    dealt = deal(costs[:whole], world_size)[rank] if whole else []
    return dealt + [place for place in range(whole, len(costs)) if place % world_size == rank]


def unit_pack(groups: Sequence[TrainGroup], number: int = 0) -> tuple[PackedExample, list[Unit]]:
    """Lay out units: `[prompt | responses without their last token]` each. No groups: an empty pack."""
    ids, positions, units, start = [], [], [], 0
    pictured: list[PromptInputs] = []  # prompts and observations in token order
    for group in groups:
        prompt = group.prompt
        length = len(prompt.input_ids)
        unit = Unit(start, length, tuple(len(response.tokens) - 1 for response in group.responses))
        ids.append(prompt.input_ids)
        positions.append(prompt.positions)
        pictured.append(prompt)
        for response in group.responses:
            ids.append(response.tokens[:-1])
            if response.observed is None:
                positions.append(following_positions(prompt.positions, len(response.tokens) - 1))
            else:
                positions.append(response.observed.inputs.positions[:, :-1])
                pictured.append(response.observed.inputs)
        units.append(unit)
        start = unit.end
    example = PackedExample(
        pack=number,
        input_ids=np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32),
        targets=np.full(start, -100, np.int32),
        position_ids=np.concatenate(positions, axis=1).astype(np.int32) if ids else np.zeros((0, 0), np.int32),
        segment_ends=np.asarray([unit.end for unit in units], np.int32),
        **(joined_pixels(pictured) if ids else no_pixels(0, 0)),
        sample_ids=[group.prompt.id for group in groups],
        sources=[group.prompt.key[0] for group in groups],
        kinds=["prompt"] * len(groups),
        sequence_length=max(start, 1),
    )
    return example, units or [Unit(0, 1)]


def policy_batch(groups: Sequence[TrainGroup], device: torch.device | str, dtype: torch.dtype) -> PolicyBatch:
    """One pack on the device."""
    example, units = unit_pack(groups)
    responses = [response for group in groups for response in group.responses]
    rows = response_rows(units, [[len(response.tokens) for response in group.responses] for group in groups])
    if any(response.observed is not None for response in responses):  # what the environment said is read and never trained
        sampled = np.concatenate([_sampled(response) for response in responses])
        rows = np.asarray(rows, np.int64)[sampled].tolist()
    tokens = [response.sampled_tokens for response in responses]
    advantages = [
        np.full(len(response.sampled_tokens), advantage)
        for group in groups
        for response, advantage in zip(group.responses, group.advantages)
    ]
    return PolicyBatch(
        batch=to_device(example, device, dtype),
        units=units,
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
        tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(0, np.int64)).to(device),
        advantages=torch.from_numpy(
            (np.concatenate(advantages) if advantages else np.zeros(0)).astype(np.float32)
        ).to(device),
        lengths=torch.tensor([len(own) for own in tokens], dtype=torch.int64, device=device),
    )  # fmt: skip


def sampled_logprobs(groups: Sequence[TrainGroup]) -> torch.Tensor:
    """float32 [response tokens]: the log-probabilities that the engine sampled them with; NaN where it does not know."""
    found = [response.sampled_logprobs for group in groups for response in group.responses]
    return torch.from_numpy(np.concatenate(found).astype(np.float32) if found else np.zeros(0, np.float32))
def _sampled(response: Response) -> np.ndarray:
    """bool [T]: the policy's own tokens."""
    return np.ones(len(response.tokens), bool) if response.observed is None else response.observed.sampled
