"""Heads that predict tokens further ahead, as one module `heads` of a model: MTP blocks or Medusa heads.

MTP (MiMo, DeepSeek-V3), depth k at row i, with h of depth 0 the model's own hidden state after its final norm:

    h_k[i] = norm(block(Linear(2H -> H)(concat[RMSNorm(h_{k-1}[i]), RMSNorm(embedding(token[i + k]))])))
    the model's own output layer on h_k[i] predicts token[i + k + 1]

The block and its norm are a language model of one layer of the model's own class, so positions and attention are those of the family. A
token's embedding is that of its id: a picture's placeholder has its own, not the picture's features. Medusa: head k (from 1) predicts
token[i + k + 1] from the model's hidden state by x + SiLU(Linear(x)) and an output layer of its own, which starts as the model's.

Parameters are named `heads.…` and belong to none of the model's parts. An export has them in `final/heads/`, not among the model's tensors.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from terrace.errors import InputError
from terrace.families.configurations import language_config
from terrace.models.build import restore_buffers
from terrace.models.families.registry import family_of_model
from terrace.models.head import LossHead
from terrace.models.parts import HEADS as PREFIX
from terrace.models.parts import mtp_models
from terrace.models.view_heads import KIND as VIEWS
from terrace.models.weights import SourceWithOwn, TensorSource, random_source

log = logging.getLogger(__name__)

FOLDER = "heads"  # beside an exported model
FINAL_NORMS = ("norm", "final_layernorm")  # as the classes of language models name it
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def is_head(name: str) -> bool:
    """Whether a parameter belongs to the heads."""
    return name.startswith(PREFIX)


class MtpBlock(nn.Module):
    """One depth."""

    def __init__(self, language: Any, config: Any) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        config.num_hidden_layers = 1
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = ["full_attention" if "full_attention" in kinds else kinds[-1]]
        self.block = type(language)(config)
        self.block.embed_tokens = nn.Identity()  # the embeddings are the model's
        for name, child in list(self.block.named_children()):
            if isinstance(child, PreTrainedModel):  # Chameleon's quantiser of pictures, which a head never asks
                delattr(self.block, name)
        norm = next(getattr(self.block, name) for name in FINAL_NORMS if hasattr(self.block, name))
        self.hidden_layernorm, self.token_layernorm = copy.deepcopy(norm), copy.deepcopy(norm)
        self.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden: torch.Tensor, embeddings: torch.Tensor, positions: torch.Tensor, attention: Mapping[str, Any]
    ) -> torch.Tensor:
        """hidden and embeddings [1, L, H], positions as the language model takes them -> [L, H]."""
        joined = self.input_proj(torch.cat([self.hidden_layernorm(hidden), self.token_layernorm(embeddings)], dim=-1))
        output = self.block(inputs_embeds=joined, position_ids=positions, attention_mask=None, use_cache=False, **attention)
        return output.last_hidden_state[0]


class MtpHeads(nn.Module):
    kind = "mtp"

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        language = family_of_model(model).language(model)
        self.layers = nn.ModuleList(MtpBlock(language, language_config(model.config)) for _ in range(count))

    @property
    def count(self) -> int:
        return len(self.layers)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.layers[0](x))


class MedusaHeads(nn.Module):
    kind = "medusa"

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        text = language_config(model.config)
        width, vocabulary = text.hidden_size, text.vocab_size
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(count))
        self.lm_heads = nn.ModuleList(LossHead(width, vocabulary, bias=False) for _ in range(count))

    @property
    def count(self) -> int:
        return len(self.blocks)


def attach_heads(model: Any, kind: str, count: int) -> None:
    """Put heads into a skeleton; memory and weights come with the model's."""
    with torch.device("meta"):
        model.heads = (MtpHeads if kind == "mtp" else MedusaHeads)(model, count)
    for block in mtp_models(model):
        block.config._attn_implementation = language_config(model.config)._attn_implementation


def mtp_hidden(
    model: Any, depth: int, hidden: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, attention: Mapping[str, Any]
) -> torch.Tensor:
    """h of depth `depth` (from 1), [L, H], from that of the depth before [L, H], tokens int64 [L] and positions [P, 1, L]."""
    family = family_of_model(model)
    embeddings = family.language(model).embed_tokens(tokens.unsqueeze(0))
    return model.heads.layers[depth - 1](hidden.unsqueeze(0), embeddings, family.language_positions(positions), attention)


# ---------------------------------------------------------------- weights and files


def source_with_heads(skeleton: Any, source: TensorSource, start: Path | None, seed: int) -> TensorSource:
    """The source of a model with heads: those of the stage it starts from, where it has such, else their first weights."""
    family, heads = family_of_model(skeleton), skeleton.heads
    stored = read_heads(start / FOLDER, heads) if start is not None else None
    tied = bool(getattr(skeleton.config, "tie_word_embeddings", False))
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters() if is_head(name)}
    random = random_source(skeleton, seed)

    def head(name: str) -> torch.Tensor:
        if stored is not None:
            return stored[name]
        if heads.kind == "medusa":
            return source(family.embedding if tied else family.head).clone() if "lm_heads" in name else torch.zeros(shapes[name])
        return random(name)

    return SourceWithOwn(source, is_head, head)


def stored_name(name: str) -> str:
    """The name of a head's tensor in a file: Medusa's as vLLM reads them, MTP's as MiMo published them."""
    name = name.removeprefix(PREFIX)
    if not name.startswith("layers."):
        return name
    _, number, rest = name.split(".", 2)
    for norm in FINAL_NORMS:
        rest = rest.replace(f"block.{norm}.", "final_layernorm.")
    return f"model.mtp_layers.{number}.{rest.replace('block.layers.0.', '')}"


def without_heads(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the model itself."""
    return {name: tensor for name, tensor in state.items() if not is_head(name)}


def heads_config(model: Any) -> dict[str, Any]:
    """config.json beside the heads."""
    heads = model.heads
    if heads.kind == VIEWS:
        return {"model_type": VIEWS, **heads.settings}
    text = language_config(model.config)
    shared = {"hidden_size": text.hidden_size, "vocab_size": text.vocab_size}
    if heads.kind == "medusa":
        return {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": heads.count, "num_hidden_layers": 1, **shared}
    return {"model_type": "mtp", "num_nextn_predict_layers": heads.count, **shared}


def write_heads(model: Any, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the heads' tensors out of a model's state (names of the model in training) into a folder of their own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {stored_name(name): tensor.contiguous() for name, tensor in state.items() if is_head(name)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    (folder / CONFIG).write_text(json.dumps(heads_config(model), indent=2, sort_keys=True) + "\n")


def stored_config(folder: Path) -> dict[str, Any] | None:
    """What a folder says of its heads; None where there are none."""
    return json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else None


def describe_heads(folder: Path) -> tuple[str, int] | None:
    """(kind, count) of the heads of further tokens in a folder; None where there are none."""
    config = stored_config(folder)
    if config is None or config["model_type"] == VIEWS:
        return None
    return ("medusa", config["num_heads"]) if config["model_type"] == "medusa" else ("mtp", config["num_nextn_predict_layers"])


def read_heads(folder: Path, heads: Any) -> dict[str, torch.Tensor] | None:
    """The tensors of stored heads under the names of a model in training. None where there are none, or none of this objective over
    views. Raises InputError for others than `heads` (MtpHeads, MedusaHeads or ViewHeads)."""
    from safetensors.torch import load_file

    config, found = stored_config(folder), describe_heads(folder)
    if heads.kind == VIEWS:
        if config != {"model_type": VIEWS, **heads.settings}:
            if config is not None:
                log.info("heads: %s holds those of another objective or of other options; new ones start", folder)
            return None
    elif found is None:
        return None
    elif found != (heads.kind, heads.count):
        raise InputError(
            f"{folder} holds {found[1]} heads of kind {found[0]}, the stage trains {heads.count} of kind {heads.kind}: change the stage, "
            "or start it from a stage without heads (`start_from`)"
        )
    stored = load_file(folder / WEIGHTS)
    names = [f"{PREFIX}{name}" for name, _ in heads.named_parameters()]
    if missing := sorted({stored_name(name) for name in names} ^ set(stored)):
        raise InputError(f"{folder / WEIGHTS} does not hold the heads of this model: {', '.join(missing[:4])}")
    return {name: stored[stored_name(name)] for name in names}


def load_with_heads(model: Any, folder: Path) -> None:
    """Give a whole model (on a device) the heads in a folder. Raises InputError if there are none."""
    found = describe_heads(folder)
    if found is None:
        raise InputError(f"{folder} holds no heads: name the final/ of a stage of objective mtp or medusa")
    attach_heads(model, *found)
    tensors = read_heads(folder, model.heads)
    assert tensors is not None
    place = next(model.parameters())
    model.heads.to_empty(device=place.device).to(place.dtype)
    for block in mtp_models(model):
        restore_buffers(block)
        block.to(place.device)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    model.heads.eval().requires_grad_(False)
