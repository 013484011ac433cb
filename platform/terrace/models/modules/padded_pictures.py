"""Pictures of different sizes in patches beside each other, padded to the largest.

Shape letters: N pictures, P patches of the largest, R patches of all, W any width.
"""

from collections.abc import Callable, Sequence

import torch

Sizes = Sequence[tuple[int, int]]  # (rows, columns) in patches of each picture


def padded(rows: torch.Tensor, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[R, ...] of pictures one after another -> [N, P, ...] with zeros behind the smaller ones, and bool [N, P], true for what is no
    padding; None where all are of one size."""
    counts = [height * width for height, width in sizes]
    longest = max(counts)
    if min(counts) == longest:
        return rows.unflatten(0, (len(counts), longest)), None
    out = torch.nn.utils.rnn.pad_sequence(rows.split(counts), batch_first=True)
    seen = torch.arange(longest)[None] < torch.tensor(counts)[:, None]
    return out, seen.to(rows.device, non_blocking=True)


def padded_tables(sizes: Sizes, table: Callable[[int, int], torch.Tensor], longest: int) -> torch.Tensor:
    """`table(rows, columns)` [rows * columns, W] of each picture, made once for each size: [N, `longest`, W], zeros behind it."""
    made = {
        (rows, columns): torch.nn.functional.pad(table(rows, columns), (0, 0, 0, longest - rows * columns))
        for rows, columns in dict.fromkeys(sizes)
    }
    return torch.stack([made[size] for size in sizes])
