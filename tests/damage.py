"""Damage for tests: bytes of a shard that are no longer those that the index knows."""

from __future__ import annotations

from terrace.data.prepare import PreparedData


def flip(prepared: PreparedData, source: str, row: int) -> str:
    """One bit of a sample's largest file; returns "source/id"."""
    location = prepared.indexes[source].location(row)
    _, offset, size, _ = max(location.members, key=lambda member: member[2])
    with open(location.shard, "r+b") as shard:
        shard.seek(offset + size // 2)
        byte = shard.read(1)[0]
        shard.seek(offset + size // 2)
        shard.write(bytes([byte ^ 4]))
    return f"{source}/{location.id}"
