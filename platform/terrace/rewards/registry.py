"""Names of rewards. A recipe names a built-in, or any importable function as `package.module:function`.

`place` says where it runs: `sandbox` (a killable subprocess; the default for everything that reads model text) or
`caller` (needs the network or a model: remote services and reward models, which have their own limits).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Literal

from terrace.errors import InputError
from terrace.rewards.types import Reward

_RULES = "terrace.rewards.rules"
BUILT_IN: dict[str, tuple[str, Literal["sandbox", "caller"]]] = {
    "text_reasoning": (f"{_RULES}.math:text_reasoning", "sandbox"),
    "visual_reasoning": (f"{_RULES}.math:visual_reasoning", "sandbox"),
    "math": (f"{_RULES}.math:math", "sandbox"),
    "grounding": (f"{_RULES}.grounding:grounding", "sandbox"),
    "gui_point": (f"{_RULES}.gui_point:gui_point", "sandbox"),
    "counting": (f"{_RULES}.counting:counting", "sandbox"),
    "temporal_grounding": (f"{_RULES}.temporal:temporal_grounding", "sandbox"),
    "ocr": (f"{_RULES}.ocr:ocr", "sandbox"),
    "chart": (f"{_RULES}.chart:chart", "sandbox"),
    "caption": (f"{_RULES}.caption:caption", "sandbox"),
    "image_counts": (f"{_RULES}.image_counts:image_counts", "sandbox"),
    "tool_call": (f"{_RULES}.tool_call:tool_call", "sandbox"),
    "gui_action": (f"{_RULES}.gui_action:gui_action", "sandbox"),
    "test_difficulty": (f"{_RULES}.unit_tests:by_difficulty", "sandbox"),
    "format": (f"{_RULES}.format:format", "sandbox"),
    "remote": ("terrace.rewards.remote:remote", "caller"),
    "reward_model": ("terrace.rewards.learned:reward_model", "caller"),
}


def place_of(name: str) -> Literal["sandbox", "caller"]:
    """Where the reward runs."""
    return BUILT_IN[name][1] if name in BUILT_IN else "sandbox"


def load_reward(name: str) -> Reward:
    """The function behind a name. Unknown names and import failures are input errors that list what exists."""
    target = BUILT_IN[name][0] if name in BUILT_IN else name
    if ":" not in target:
        raise InputError(
            f"reward {name!r} is not known: use one of {', '.join(sorted(BUILT_IN))}, or package.module:function"
        )
    return load_named(target, f"reward {name!r}")


def load_named(target: str, what: str) -> Callable[..., Any]:
    """The function at `package.module:function`. Raises InputError, naming `what` wants it, where it cannot be imported."""
    module_name, function_name = target.split(":", 1)
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever a module does that is not ours, or a name that none can have
        raise InputError(f"{what}: cannot import {target} ({type(error).__name__}: {error})") from error
