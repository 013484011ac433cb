"""The dynamic loss scale that fp16 needs: gradients are computed of `loss * value`, so that small ones do not vanish."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """Dynamic loss scale of fp16: halved at an overflow, doubled after `growth_interval` steps without one.

    Ranks agree without a message: the gradient norm that decides is the same on all of them.
    """

    value: float = 65536.0
    growth_interval: int = 1000
    good_steps: int = 0
    overflows: int = 0

    def after_step(self) -> None:
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.value = min(self.value * 2.0, 2.0**24)
            self.good_steps = 0

    def after_overflow(self) -> None:
        self.value = max(self.value / 2.0, 1.0)
        self.good_steps = 0
        self.overflows += 1

    def state(self) -> dict[str, float | int]:
        return {"value": self.value, "good_steps": self.good_steps, "overflows": self.overflows}

    def restore(self, state: dict[str, float | int]) -> None:
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
        self.overflows = int(state["overflows"])
