"""Two-dimensional sine positions: half of the numbers say the column, half the row, each half sines and then cosines.

Of a half of N numbers, number i (of the first N / 2) is sin(place / 10000^(2 i / N)), and the same with cos behind it.
"""

import torch


def sine_positions(width: int, rows: int, columns: int, device: torch.device | str | None = None) -> torch.Tensor:
    """float32 [rows * columns, width] in reading order. `width` is a multiple of four."""
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)

    def along(count: int) -> torch.Tensor:
        angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device)

    by_column = along(columns)[None].expand(rows, -1, -1)
    by_row = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=2).reshape(rows * columns, width)


def resized_positions(width: int, grid: int, rows: int, columns: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The positions of a square grid, stretched over another one by bicubic interpolation: float32 [rows * columns, width]."""
    table = sine_positions(width, grid, grid, device)
    if (rows, columns) == (grid, grid):
        return table
    picture = table.view(1, grid, grid, width).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(picture, (rows, columns), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(rows * columns, width)
