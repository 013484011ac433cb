"""Environments: what answers back. A plain function in the sandbox, one call for each answer of the policy.

    def environment(conversation, response, state, **options) -> Step

`conversation` is the list of messages so far, the answer last, as data.types.Sample has them. `response` is that answer's text.
`state` is a dict that the function may change and finds again in the next call; in every call it holds `solution` and `metadata` of
the row (with `image_sizes` and `model_sizes` of all images so far), `turn` (1 for the first answer), `turns` (at most so many) and
`cut` (the answer ran into the length limit, so it is the last). An environment that is marked `environment.sees_images = True` finds
`images` there too: the encoded files, as bytes.

What it answers, a `Step` or a dict of the same keys: `observation`, a text or a list of texts and pictures (bytes of a file, a PIL
picture, or uint8 [H, W, 3]); `reward`, a number, or None for nothing earned; `done`. What a conversation earns in all lies in [0, 1].
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from terrace.errors import InputError
from terrace.rewards.registry import load_named
from terrace.rewards.types import plain_value

BUILT_IN = {  # recipe.rules_rl names them too
    "clicking": "terrace.rewards.environments.clicking:clicking",
}
GIVEN = ("solution", "metadata", "turn", "turns", "cut", "images")  # of `state`: set in every call, never kept


class Step(NamedTuple):
    """What an environment answers."""

    observation: Any = None
    reward: float | None = None
    done: bool = False


Environment = Callable[..., Step]


def target_of(name: str) -> str:
    """`package.module:function` of an environment's name."""
    return BUILT_IN.get(name, name)


def load_environment(name: str) -> Environment:
    """The function behind a name. Raises InputError for an unknown one and for what cannot be imported."""
    if ":" not in target_of(name):
        raise InputError(f"environment {name!r} is not known: use one of {', '.join(sorted(BUILT_IN))}, or package.module:function")
    return load_named(target_of(name), f"environment {name!r}")


def sees_images(name: str) -> bool:
    """Whether the environment is given the pictures of the conversation."""
    return bool(getattr(load_environment(name), "sees_images", False))


# ---------------------------------------------------------------- in the sandbox


def step_of(environment: Environment, call: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """One call, as plain JSON: `items` of the observation (None: no observation), `reward`, `done` and what is kept of `state`; or
    `failure`."""
    state = {**call["kept"], **call["given"]}
    if "images" in state:
        state["images"] = [base64.b64decode(image) for image in state["images"]]
    try:
        said = environment(call["conversation"], call["response"], state, **options)
        step = Step(**said) if isinstance(said, Mapping) else said
        if not isinstance(step, Step):
            return {"failure": f"it answered {type(said).__name__}, which is no Step"}
        items = None if step.observation is None else _items(step.observation)
        reward = None if step.reward is None else plain_value(step.reward)
        if step.reward is not None and not (reward is not None and 0.0 <= reward <= 1.0):  # also of NaN
            return {"failure": f"its reward {str(step.reward)[:60]!r} is no number in [0, 1]"}
        if not step.done and not items:
            return {"failure": "it neither ends the conversation (done) nor has an observation"}
        kept = json.loads(json.dumps({key: value for key, value in state.items() if key not in GIVEN}))
    except MemoryError:
        return {"failure": "memory limit", "restart": True}
    except RecursionError:
        return {"failure": "nested too deep"}
    except Exception as error:  # an environment's mistake is one counted failure with its reason
        return {"failure": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"items": items, "reward": reward, "done": bool(step.done), "kept": kept}


def _items(observation: Any) -> list[dict[str, str]]:
    """Texts as `{"text"}`, pictures as `{"image"}` in base64. Raises TypeError for anything else."""
    parts = observation if isinstance(observation, list | tuple) else [observation]
    return [{"text": part} if isinstance(part, str) else {"image": base64.b64encode(_file(part)).decode()} for part in parts]


def _file(picture: Any) -> bytes:
    if isinstance(picture, bytes | bytearray):
        return bytes(picture)
    from PIL import Image

    if not isinstance(picture, Image.Image):
        shape, kind = getattr(picture, "shape", ()), str(getattr(picture, "dtype", ""))
        if len(shape) != 3 or shape[2] != 3 or kind != "uint8":
            raise TypeError(f"an observation holds texts and pictures (bytes, PIL, uint8 [H, W, 3]), found {type(picture).__name__}")
        picture = Image.fromarray(picture)
    out = io.BytesIO()
    picture.convert("RGB").save(out, "PNG")
    return out.getvalue()
