"""Find something on a screen and press it: a click that misses is drawn on the screen, which is shown again, until the turns are over.

For any rows of a screenshot and the box of what is to be pressed (`solution: {"bbox": [x1, y1, x2, y2]}` in the pixels of image 0). A hit
is worth 1 in the first turn and `turn_cost` less in each further one. With `closeness` a conversation that ends with a miss is worth
something too: so much for a last click on the box's edge, in proportion less the further away it lies, nothing where it is no click.
"""

from __future__ import annotations

import importlib
import io
import math
from typing import Any, Literal

from terrace.rewards.environment import Step
from terrace.rewards.rules.coordinates import from_answer_units, one_point, solution_box, to_model_pixels

ARM = 0.04  # of a pointer's cross, of the screen's longer side


def clicking(
    conversation: list[dict[str, Any]],
    response: str,
    state: dict[str, Any],
    *,
    turn_cost: float = 0.1,
    hints: bool = False,
    closeness: float = 0.0,
    coordinates: Literal["pixels", "relative_1000", "relative_1"] = "pixels",
) -> Step:
    """`hints`: a miss also says in words where the target lies, as seen from the click. `closeness`: at most 1 - turns x `turn_cost`, or a
    miss could be worth more than a hit; distances are shares of the screen's diagonal."""
    solution = solution_box(state["solution"])
    if solution is None or solution[1] != 0:
        raise ValueError("the solution is no box on the row's first image")
    x1, y1, x2, y2 = box = to_model_pixels(solution[0], state["metadata"])
    found = one_point(response)
    point = None if found is None else from_answer_units(found, coordinates, state["metadata"])
    if state["cut"]:  # an answer without an end is no click
        return Step(reward=0.0, done=True)
    if point is not None and x1 <= point[0] <= x2 and y1 <= point[1] <= y2:
        return Step(reward=max(0.0, 1.0 - turn_cost * (state["turn"] - 1)), done=True)
    if state["turn"] == state["turns"]:
        return Step(reward=0.0 if point is None else closeness * _nearness(point, box, state["metadata"]), done=True)
    if point is None:
        return Step("That is no click. Answer with one point.")
    clicks = state.setdefault("clicks", [])
    clicks.append(point)
    hint = f" Go {' and '.join(_ways(point, box))}." if hints else " Click again."
    return Step([_screen(state["images"][0], clicks, state["metadata"]), f"Missed.{hint}"])


clicking.sees_images = True  # type: ignore[attr-defined]


def warm_up() -> None:
    """What the sandbox does before the clock of a call runs."""
    importlib.import_module("PIL.ImageDraw")


def _ways(point: list[float], box: tuple[float, float, float, float]) -> list[str]:
    ways = ["left"] if point[0] > box[2] else ["right"] if point[0] < box[0] else []
    return ways + (["up"] if point[1] > box[3] else ["down"] if point[1] < box[1] else [])


def _nearness(point: list[float], box: tuple[float, float, float, float], metadata: dict[str, Any]) -> float:
    """1 on the box, 0 a diagonal of the screen away."""
    away = math.hypot(*(max(low - value, 0.0, value - high) for value, low, high in zip(point, box[:2], box[2:])))
    return max(0.0, 1.0 - away / math.hypot(*metadata["model_sizes"][0]))


def _screen(image: bytes, clicks: list[list[float]], metadata: dict[str, Any]) -> Any:
    """The screen with a cross at each click (model's pixels), black on white so that it shows on everything."""
    from PIL import Image, ImageDraw

    screen = Image.open(io.BytesIO(image)).convert("RGB")
    seen = metadata["model_sizes"][0] if metadata.get("model_sizes") else screen.size
    arm, width = max(3, round(ARM * max(screen.size))), max(1, round(ARM * max(screen.size) / 4))
    pen = ImageDraw.Draw(screen)
    for click in clicks:
        x, y = (value * whole / part for value, whole, part in zip(click, screen.size, seen))
        for colour, thick in (((255, 255, 255), 3 * width), ((0, 0, 0), width)):
            pen.line((x - arm, y, x + arm, y), fill=colour, width=thick)
            pen.line((x, y - arm, x, y + arm), fill=colour, width=thick)
    return screen
