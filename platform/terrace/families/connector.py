"""What stands between a vision tower and a language model of different origin: `model.connector` of a recipe, whose schema this is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

OPTIONS: dict[str, tuple[str, ...]] = {  # kind -> options that mean something to it
    "linear": (),
    "mlp": ("layers",),
    "mlp_layer_norm": ("layers",),
    "glu": ("width",),
    "pixel_shuffle_mlp": ("merge",),
    "resampler": ("queries", "heads", "positions", "output_projection"),
    "q_former": ("queries", "heads", "layers", "width"),
    "class_tokens": ("every", "width"),
}


class Connector(BaseModel):
    """From features of patches to visual tokens. Options of another kind are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    kind: Literal["linear", "mlp", "mlp_layer_norm", "glu", "pixel_shuffle_mlp", "resampler", "q_former", "class_tokens"] = Field(
        "mlp",
        description="`linear` (LLaVA), `mlp` with GELU (LLaVA-1.5), `mlp_layer_norm` (Yi-VL), `glu` (CogVLM) and `pixel_shuffle_mlp`"
        " (InternVL): one token per"
        " patch, or per `merge`² patches; `resampler` (Qwen-VL, LLaVA-UHD, MiniCPM-V), `q_former` (BLIP-2): one token per query;"
        " `class_tokens` (LaVIN): the class token behind every few blocks of the tower, through a narrow MLP.",
    )
    layers: int = Field(
        2, ge=1, description="Linear layers of an MLP; layers of a Q-Former, which looks at the picture in every second one."
    )
    merge: int = Field(2, ge=1, description="Patches along a side that become one token (pixel_shuffle_mlp).")
    queries: int = Field(64, ge=1, description="Learned queries, and so visual tokens of a picture (resampler, q_former).")
    heads: int | None = Field(
        None, ge=1, description="Attention heads; default: one per 128 of the width (resampler), or per 64 (q_former)."
    )
    positions: Literal["queries_and_keys", "keys"] = Field(
        "queries_and_keys",
        description="Where a resampler adds 2D sine positions: to queries, a square grid, and keys (Qwen-VL), or to keys (MiniCPM-V).",
    )
    output_projection: Literal["none", "projector", "vision"] = Field(
        "none",
        description="A LayerNorm and a linear layer behind a resampler's attention: of the projector (MiniCPM-V), or counted, trained and"
        " frozen with the vision tower (Qwen-VL).",
    )
    width: int = Field(768, ge=4, description="Width of a Q-Former, or inside the feed-forward of glu or class_tokens.")
    every: int = Field(4, ge=1, description="Blocks of the tower from one class token that is taken to the next (class_tokens).")


def checked(config: Mapping[str, Any]) -> Connector | None:
    """The connector of a configuration map, or None where it has none or one that is not well formed."""
    try:
        return Connector.model_validate(config.get("connector"))
    except ValidationError:
        return None


def folded(value: Any) -> Any:
    """`model:` of a recipe with its connector, every default written out, inside the configuration that families read."""
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        return value
    given = value.get("connector") or value["config"].get("connector")
    if given is None:
        return value
    try:
        connector = Connector.model_validate(given)
    except ValidationError:
        return value  # which the field, or the family's check of the configuration, will say
    options = connector.model_dump()
    if connector.kind != "class_tokens" and options["every"] == Connector.model_fields["every"].default:
        del options["every"]  # came later: what runs and checkpoints have of other kinds stays as it was
    return {**value, "config": {**value["config"], "connector": options}}


def findings(connector: Connector, vision_width: int | None, width: int | None, across: int | None) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it), given the widths of tower and language model and the patches along a picture's side."""
    for name, field in Connector.model_fields.items():
        if name != "kind" and name not in OPTIONS[connector.kind] and getattr(connector, name) != field.default:
            fitting = [kind for kind, options in OPTIONS.items() if name in options]
            yield name, f"is an option of {' and '.join(fitting)}, not of {connector.kind}"
    if connector.kind == "pixel_shuffle_mlp" and across is not None and across % connector.merge:
        yield "merge", f"{connector.merge} does not divide the {across} patches of a side"
    inner = {"resampler": width, "q_former": connector.width}.get(connector.kind)
    if inner is None:
        return
    heads = connector.heads or max(1, inner // (128 if connector.kind == "resampler" else 64))
    if inner % heads:
        yield "heads", f"{heads} heads do not divide the width {inner}"
    if connector.kind == "resampler" and inner % 4:
        yield "kind", f"a resampler's positions need a width that four divides, not {inner}"
    on_a_grid = connector.kind == "resampler" and connector.positions == "queries_and_keys"
    if on_a_grid and math.isqrt(connector.queries) ** 2 != connector.queries:
        yield "queries", f"{connector.queries} queries form no square grid; take a square number, or positions: keys"
