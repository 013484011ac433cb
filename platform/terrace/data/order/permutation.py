"""Seeded order of a source: position -> row by arithmetic, for any epoch and any size, without a table.

A permutation is a Feistel network over the smallest power of two that holds the domain, walked until it lands inside it
(under two rounds of walking on average). Sources are shuffled by blocks: runs of `BLOCK` neighbouring rows move as one,
and rows mix freely only within a group of `GROUP_BLOCKS` such runs. Reading then touches 64 stretches of a shard at a
time instead of jumping over petabytes, and a source below 16,384 rows is simply shuffled whole. 0.4 microseconds a row.

Nothing here depends on numpy's random generators, so an order does not change with a library version.
"""

from __future__ import annotations

import hashlib

import numpy as np

BLOCK = 256  # neighbouring rows that keep together on the large scale
GROUP_BLOCKS = 64  # blocks whose rows mix freely
ROUNDS = 8
_MASK64 = (1 << 64) - 1


def seed_of(*parts: object) -> int:
    """A 64-bit seed from names and numbers, for example `seed_of(recipe_seed, stage, source, epoch)`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def generator_of(seed: int, source: str, sample: str, epoch: int, purpose: str) -> np.random.Generator:
    """Chance of a sample in a pass over its source."""
    return np.random.default_rng(seed_of(purpose, seed, source, sample, epoch))


def mix64(values: np.ndarray, key: int) -> np.ndarray:
    """A well-mixed 64-bit hash of each value under a key (the SplitMix64 finisher). uint64, elementwise."""
    mixed = values + np.uint64(key & _MASK64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def permute(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """A seeded permutation of [0, size) at the given positions: int64, elementwise."""
    values = np.asarray(positions, dtype=np.uint64)
    if size <= 1:
        return values.astype(np.int64)
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = [seed_of(seed, turn) for turn in range(ROUNDS)]

    def turn_once(block: np.ndarray) -> np.ndarray:
        high, low = block >> low_bits, block & low_mask
        for turn in range(0, ROUNDS, 2):
            high = (high ^ mix64(low, keys[turn])) & high_mask
            low = (low ^ mix64(high, keys[turn + 1])) & low_mask
        return (high << low_bits) | low

    with np.errstate(over="ignore"):
        result = turn_once(values)
        outside = np.flatnonzero(result >= size)
        while outside.size:
            result[outside] = turn_once(result[outside])
            outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def shuffled_rows(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Rows of a source of `size` rows at the given positions of one epoch, shuffled by blocks: int64, elementwise.

    A permutation of [0, size): over an epoch every row appears exactly once.
    """
    positions = np.asarray(positions, dtype=np.int64)
    group = BLOCK * GROUP_BLOCKS
    if size <= group:
        return permute(positions, size, seed)
    # 1. Mix positions within their group; the last group may be short.
    mixed = np.empty_like(positions)
    group_numbers = positions // group
    for number in np.unique(group_numbers):
        inside = group_numbers == number
        start = int(number) * group
        members = min(group, size - start)
        mixed[inside] = start + permute(positions[inside] - start, members, seed_of(seed, "group", number))
    # 2. Order the blocks. The last, short block stands at a seeded place between the whole ones.
    whole_blocks, short = divmod(size, BLOCK)
    place = seed_of(seed, "short") % (whole_blocks + 1) * BLOCK
    in_short = (mixed >= place) & (mixed < place + short)
    shifted = np.where(mixed >= place + short, mixed - short, mixed)
    shifted = np.where(in_short, 0, shifted)
    block_numbers, offsets = np.divmod(shifted, BLOCK)
    rows = permute(block_numbers, whole_blocks, seed_of(seed, "blocks")) * BLOCK + offsets
    return np.where(in_short, whole_blocks * BLOCK + mixed - place, rows)


def source_rows(draws: np.ndarray, size: int, seed: int, source: str) -> np.ndarray:
    """Rows of a source at its n-th draws, counted over epochs: draw // size is the epoch, each with its own order."""
    draws = np.asarray(draws, dtype=np.int64)
    epochs, positions = np.divmod(draws, size)
    rows = np.empty_like(draws)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        rows[inside] = shuffled_rows(positions[inside], size, seed_of(seed, source, int(epoch)))
    return rows
