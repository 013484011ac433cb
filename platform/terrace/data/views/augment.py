"""Views carried out on the device: from squares of uint8 pixels and plans (data.views.plans) to pixels as the tower takes them.

Cutting, resizing, mirroring and blurring are products with matrices that differ from picture to picture, so that a batch of any plans is
two batched multiplications; resizing averages where it makes smaller (a triangle as wide as the step between pixels), as Pillow's
bilinear filter does. Values stay fractions between the operations, where pipelines of uint8 pictures round.

Shape letters: B pictures, S side of the square, s side of the view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from terrace.data.views.plans import ViewPlan

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow turns colours into grey


def make_views(pixels: torch.Tensor, plans: Sequence[ViewPlan]) -> torch.Tensor:
    """float32 [B, 3, s, s] in 0 to 1 of squares uint8 [B, 3, S, S]; one plan each, all of the same side."""
    device, whole = pixels.device, pixels.shape[-1]
    [side] = {plan.side for plan in plans}
    boxes = torch.tensor([plan.box for plan in plans], dtype=torch.float32, device=device)
    flipped = torch.tensor([plan.flipped for plan in plans], device=device)
    across = _resize(boxes[:, 0], boxes[:, 2], side, whole)
    across = torch.where(flipped[:, None, None], across.flip(1), across)
    down = _resize(boxes[:, 1], boxes[:, 3], side, whole)
    views = down[:, None] @ (pixels.float() / 255.0) @ across[:, None].mT
    views = _jittered(views, plans)
    views = _where(views, [plan.grey for plan in plans], lambda some: _grey(some).expand(-1, 3, -1, -1))
    sigmas = torch.tensor([plan.blur_sigma for plan in plans], device=device)
    if bool((sigmas > 0).any()):
        kernel = _blur(sigmas, side)[:, None]
        views = kernel @ views @ kernel.mT
    return _where(views, [plan.solarised for plan in plans], lambda some: torch.where(some >= 128 / 255, 1 - some, some))


def _where(views: torch.Tensor, chosen: Sequence[bool], change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The views, those that are chosen changed."""
    places = [place for place, yes in enumerate(chosen) if yes]
    if not places:
        return views
    index = torch.tensor(places, device=views.device)
    return views.index_copy(0, index, change(views.index_select(0, index)).contiguous())


def _resize(starts: torch.Tensor, lengths: torch.Tensor, side: int, whole: int) -> torch.Tensor:
    """[B, s, S]: how each of `side` pixels is made of those of a line of `whole`, cut to `starts` and `lengths` [B] first."""
    steps = lengths / side
    centres = starts[:, None] + (torch.arange(side, device=starts.device) + 0.5) * steps[:, None]
    places = torch.arange(whole, device=starts.device) + 0.5
    weights = 1.0 - (places - centres[..., None]).abs() / steps.clamp_min(1.0)[:, None, None]
    inside = (places > starts[:, None]) & (places < (starts + lengths)[:, None])
    weights = weights.clamp_min(0.0) * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _blur(sigmas: torch.Tensor, side: int) -> torch.Tensor:
    """[B, s, s]: a Gaussian over a line, the weights of places outside dealt to those inside; 0 leaves the line as it is."""
    places = torch.arange(side, device=sigmas.device, dtype=torch.float32)
    squares = (places[:, None] - places).square()
    weights = torch.exp(-squares / (2 * sigmas.clamp_min(1e-3).square())[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


def _grey(views: torch.Tensor) -> torch.Tensor:
    """[B, 1, s, s]."""
    return (views * torch.tensor(LUMA, device=views.device)[:, None, None]).sum(1, keepdim=True)


def _jittered(views: torch.Tensor, plans: Sequence[ViewPlan]) -> torch.Tensor:
    """Place after place of each plan's own order."""
    for place in range(max(len(plan.jitter) for plan in plans)):
        for name, change in CHANGES.items():
            chosen = [len(plan.jitter) > place and plan.jitter[place][0] == name for plan in plans]
            values = [plan.jitter[place][1] for plan, yes in zip(plans, chosen) if yes]
            amounts = torch.tensor(values, dtype=torch.float32, device=views.device)[:, None, None, None]
            views = _where(views, chosen, lambda some, change=change, amounts=amounts: change(some, amounts).clamp(0.0, 1.0))
    return views


def _turned(views: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Colours turned on the circle of hues by a share of it; lightest and darkest channel stay."""
    red, green, blue = views.unbind(1)
    high, low = views.amax(1), views.amin(1)
    spread = high - low
    safe = spread.clamp_min(1e-12)
    hue = torch.where(
        high == red, (green - blue) / safe, torch.where(high == green, (blue - red) / safe + 2.0, (red - green) / safe + 4.0)
    )
    hue = (hue + 6.0 * turns[:, 0]) % 6.0
    # Each channel is high within one sixth of the circle around its own colour, low opposite of it, and on the way between.
    distances = [(torch.remainder(hue - centre + 3.0, 6.0) - 3.0).abs() for centre in (0.0, 2.0, 4.0)]
    return torch.stack([low + spread * (2.0 - distance).clamp(0.0, 1.0) for distance in distances], dim=1)


CHANGES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": lambda views, factors: views * factors,
    "contrast": lambda views, factors: torch.lerp(_grey(views).mean((2, 3), keepdim=True).expand_as(views), views, factors),
    "saturation": lambda views, factors: torch.lerp(_grey(views).expand_as(views), views, factors),
    "hue": _turned,
}
