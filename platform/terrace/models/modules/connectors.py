"""What may stand between a tower and a language model: from features of patches [N, P, W] to visual tokens [N, T, H]."""

from typing import Any

import torch
from torch import nn

from .q_former import QFormer
from .resampler import Resampler


class Mlp(nn.Module):
    """Linear layers with GELU between them, one of them a plain linear connector; with a LayerNorm behind each (Yi-VL) if wanted."""

    def __init__(self, vision_width: int, width: int, layers: int, norms: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width if number else vision_width, width) for number in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers)) if norms else None

    def forward(self, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            features = layer(nn.functional.gelu(features) if number else features)
            features = features if self.norms is None else self.norms[number](features)
        return features


class PixelShuffleMlp(nn.Module):
    """InternVL's: `merge` x `merge` neighbours become one long row (row by row), a LayerNorm, two linear layers with GELU."""

    def __init__(self, vision_width: int, width: int, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.norm = nn.LayerNorm(vision_width * merge**2)
        self.up_proj, self.down_proj = nn.Linear(vision_width * merge**2, width), nn.Linear(width, width)

    def forward(self, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        cells = features.unflatten(1, (rows // self.merge, self.merge, columns // self.merge, self.merge)).transpose(2, 3)
        return self.down_proj(nn.functional.gelu(self.up_proj(self.norm(cells.flatten(3).flatten(1, 2)))))


class Glu(nn.Module):
    """CogVLM's: a linear layer, LayerNorm and GELU, then a gated feed-forward (SwiGLU); no biases."""

    def __init__(self, vision_width: int, width: int, inner: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(vision_width, width, bias=False), nn.LayerNorm(width)
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        features = nn.functional.gelu(self.norm(self.linear(features)))
        return self.down_proj(nn.functional.silu(self.gate_proj(features)) * self.up_proj(features))


class NarrowMlp(nn.Module):
    """LaVIN's, over class tokens of several blocks: down to a narrow width, SiLU, and up."""

    def __init__(self, vision_width: int, width: int, inner: int) -> None:
        super().__init__()
        self.down_proj, self.up_proj = nn.Linear(vision_width, inner), nn.Linear(inner, width)

    def forward(self, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return self.up_proj(nn.functional.silu(self.down_proj(features)))


def make_connector(options: dict[str, Any], vision_width: int, width: int) -> nn.Module:
    """The connector that a configuration's `connector` describes."""
    kind = options["kind"]
    if kind in ("linear", "mlp", "mlp_layer_norm"):
        return Mlp(vision_width, width, 1 if kind == "linear" else options["layers"], kind == "mlp_layer_norm")
    if kind == "pixel_shuffle_mlp":
        return PixelShuffleMlp(vision_width, width, options["merge"])
    if kind == "glu":
        return Glu(vision_width, width, options["width"])
    if kind == "class_tokens":
        return NarrowMlp(vision_width, width, options["width"])
    if kind == "resampler":
        heads = options["heads"] or max(1, width // 128)
        projects = options["output_projection"] != "none"
        return Resampler(vision_width, width, options["queries"], heads, options["positions"], projects)
    if kind == "q_former":
        heads = options["heads"] or max(1, options["width"] // 64)
        return QFormer(vision_width, width, options["queries"], options["layers"], options["width"], heads)
    raise ValueError(f"connector: there is no kind {kind!r}")
