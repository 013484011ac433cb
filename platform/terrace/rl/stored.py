"""What an iteration has reached, on disk: rollouts of a round, then their rewards. A killed run goes on from there.

One pair of files per round and rank below `<stage>/iterations/<number>/`. Each carries an identity (stage hash,
iteration, round, rank, number of ranks, prompts); a file of another identity is as good as none. A rollout that was cut
off while decoding is made again: sampling depends on seeds alone, so it comes out the same.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.types import PromptInputs
from terrace.generation.interface import Observed, Response
from terrace.storage.durable import json_bytes, write_durably

# The value, or None and why there is none; and per rule what was read as the answer and what decided.
StoredReward = tuple[float | None, str | None, Mapping[str, str]]


def iteration_folder(stage_dir: Path, iteration: int) -> Path:
    return stage_dir / "iterations" / f"{iteration:06d}"


def rollout_bytes(identity: dict[str, Any], groups: Sequence[Sequence[Response]]) -> bytes:
    """Groups of responses, and what they are of, as one file."""
    responses = [response for group in groups for response in group]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        identity=np.frombuffer(json_bytes(identity), np.uint8),
        groups=np.asarray([len(group) for group in groups], np.int64),
        lengths=np.asarray([len(response.tokens) for response in responses], np.int64),
        tokens=np.concatenate([response.tokens for response in responses]) if responses else np.zeros(0, np.int32),
        logprobs=np.concatenate([response.logprobs for response in responses]) if responses else np.zeros(0, np.float32),
        finished=np.asarray([response.finished for response in responses], bool),
        versions=np.concatenate([_versions(response) for response in responses]) if responses else np.zeros(0, np.int32),
        **{name: value for number, one in enumerate(responses) for name, value in _observed(number, one.observed).items()},
    )
    return buffer.getvalue()


def rollout_from(content: bytes) -> tuple[bytes, list[list[Response]]]:
    """The identity, as JSON, and the groups of `rollout_bytes`."""
    with np.load(io.BytesIO(content)) as stored:
        ends = np.cumsum(stored["lengths"])[:-1]
        tokens, logprobs = np.split(stored["tokens"], ends), np.split(stored["logprobs"], ends)
        versions = np.split(stored["versions"], ends) if "versions" in stored else [None] * len(tokens)
        observed = [_read_observed(stored, number, own) for number, own in enumerate(tokens)]
        flat = [Response(*five) for five in zip(tokens, logprobs, stored["finished"].tolist(), observed, versions)]
        identity, counts = stored["identity"].tobytes(), stored["groups"].tolist()
    return identity, [flat[start:end] for start, end in itertools.pairwise(np.cumsum([0, *counts]).tolist())]


def save_rollout(path: Path, identity: dict[str, Any], groups: Sequence[Sequence[Response]]) -> None:
    """Write a round's responses of this rank, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, rollout_bytes(identity, groups))


def stored_identity(path: Path) -> dict[str, Any] | None:
    """Of which rollout a file is, or None if there is none."""
    if not path.is_file():
        return None
    with np.load(path) as stored:
        return json.loads(stored["identity"].tobytes())


def load_rollout(path: Path, identity: dict[str, Any]) -> list[list[Response]] | None:
    """The responses of a round, or None if there is no file of this identity."""
    if not path.is_file():
        return None
    found, groups = rollout_from(path.read_bytes())
    return groups if found == json_bytes(identity) else None


def _versions(response: Response) -> np.ndarray:
    """int32 [T]; -1 where the engine does not tell."""
    return np.full(len(response.tokens), -1, np.int32) if response.versions is None else response.versions


_INPUTS = ("positions", "pixels", "image_facts", "image_tokens", "image_rows")


def _observed(number: int, observed: Observed | None) -> dict[str, Any]:
    """What is stored of a conversation beside its tokens, as arrays by name."""
    if observed is None:
        return {}
    lengths = [len(image) for image in observed.images]
    said = {"value": observed.value, "failure": observed.failure, "messages": observed.messages, "images": lengths}
    arrays = {name: getattr(observed.inputs, name) for name in _INPUTS}
    arrays |= {
        "sampled": observed.sampled, "said": np.frombuffer(json_bytes(said), np.uint8),
        "files": np.frombuffer(b"".join(observed.images), np.uint8),
    }  # fmt: skip
    return {f"{number}/{name}": value for name, value in arrays.items()}


def _read_observed(stored: Any, number: int, tokens: np.ndarray) -> Observed | None:
    if f"{number}/sampled" not in stored:
        return None
    said = json.loads(stored[f"{number}/said"].tobytes())
    files, ends = stored[f"{number}/files"].tobytes(), np.cumsum(said["images"]).tolist()
    inputs = PromptInputs(tokens, *(stored[f"{number}/{name}"] for name in _INPUTS))
    images = tuple(files[end - length : end] for end, length in zip(ends, said["images"]))
    return Observed(stored[f"{number}/sampled"], inputs, said["value"], said["failure"], tuple(said["messages"]), images)


def save_rewards(path: Path, identity: dict[str, Any], rewards: Sequence[Sequence[StoredReward]]) -> None:
    """Write a round's rewards, per group and response."""
    write_durably(
        path, json_bytes({"identity": identity, "rewards": [[list(one) for one in group] for group in rewards]})
    )


def load_rewards(path: Path, identity: dict[str, Any]) -> list[list[StoredReward]] | None:
    """The rewards of a round, or None if there is no file of this identity. Files of before have no word of what was read."""
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    if stored["identity"] != json.loads(json_bytes(identity)):
        return None
    return [[(value, failure, said[0] if said else {}) for value, failure, *said in group] for group in stored["rewards"]]


def forget_iterations(stage_dir: Path, before: int) -> None:
    """Remove what a checkpoint has made superfluous."""
    for folder in (stage_dir / "iterations").glob("[0-9]*"):
        if folder.name.isdigit() and int(folder.name) < before:
            shutil.rmtree(folder, ignore_errors=True)
