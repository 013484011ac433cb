"""Low-rank adapters in a model, through peft: where they go, what they start from, and what is left of them in an export.

peft puts A and B beside a linear layer, whose own weight then stands under `NAME.base_layer`. A skeleton gets its adapters
before a strategy gives it memory, so every strategy shards, saves and loads them like any other tensor, by name. Weights
come from where they would without adapters; A is drawn from the stage's seed and its own name (peft's distribution), B is
zero. `merged` turns the tensors of such a model back into those of the plain one, W + scale B A in float32: what is
exported, handed to the next stage and given to engines that answer.

Dropout acts where gradients are recorded and nowhere else, so evaluations and rollouts of a model in training have none.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from terrace.errors import InputError, nearest
from terrace.models.families.registry import family_of_model
from terrace.models.weights import SourceWithOwn, TensorSource
from terrace.recipe.schema import PARTS, Stage
from terrace.recipe.schema_training import Lora

ADAPTER = "default"  # peft's name of the only adapter
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}."


def uses_lora(stage: Stage) -> bool:
    return any((training := getattr(stage.train, part)) is not None and training.lora is not None for part in PARTS)


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return DOWN in name or UP in name


def plain_name(name: str) -> str:
    """The name of a base weight in the model without adapters."""
    return name.replace(BASE, ".")


class DropoutWithGradients(nn.Dropout):
    """Dropout of an adapter's input; nothing happens where no gradient is recorded."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if torch.is_grad_enabled() else input


def lora_targets(model: Any, stage: Stage) -> dict[str, Lora]:
    """Linear layers of a plain model that the stage adapts, by name. Raises InputError for a target that names none."""
    family = family_of_model(model)
    unused = set(family.unused(model.config, [name for name, _ in model.named_parameters()]))
    found: dict[str, Lora] = {}
    for part in PARTS:
        training = getattr(stage.train, part)
        if training is None or training.lora is None:
            continue
        possible = [
            name for name, module in model.named_modules()
            if type(module) is nn.Linear and f"{name}.weight" not in unused and family.part_of(f"{name}.weight") == part
            and (part not in family.blocks or family.block_number(f"{name}.weight") is not None)
        ]  # fmt: skip
        wanted = training.lora.targets
        for target in wanted:
            if not any(name.endswith(f".{target}") for name in possible):
                if fused := _fused(model, target):
                    raise InputError(
                        f"stage {stage.name}: train.{part}.lora.targets: `{target}` is one tensor for all experts ({fused}), which adapters"
                        " beside linear layers cannot reach; adapt the layers of attention, or train the experts whole (`only`)"
                    )
                words = sorted({name.rpartition(".")[2] for name in possible})
                raise InputError(
                    f"stage {stage.name}: train.{part}.lora.targets: no linear layer of {part} is named `{target}`{nearest(target, words)};"
                    f" there are {', '.join(words) or 'none'}"
                )
        for name in possible:
            if not wanted or any(name.endswith(f".{target}") for target in wanted):
                found[name] = training.lora
        if not possible:
            raise InputError(f"stage {stage.name}: train.{part}.lora: {part} has no linear layer to adapt")
    return found


def _fused(model: Any, target: str) -> str | None:
    """A tensor [experts, rows, columns] that a target's words name, itself or the module that holds it."""
    found = (name for name, parameter in model.named_parameters() if parameter.dim() == 3)
    return next((name for name in found if f".{target}." in f".{name}."), None)


def add_lora(model: Any, stage: Stage) -> None:
    """Put the stage's adapters into a skeleton; which parameters take gradients is decided afterwards."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora_targets(model, stage)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the parts' adapters are one, made in turn
        for lora in dict.fromkeys(map(_key, targets.values())):
            own = [name for name, other in targets.items() if _key(other) == lora]
            rank, alpha, dropout, stabilised = lora
            # A part's adapters at a time: peft's patterns of ranks know nothing of dropout.
            config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=stabilised, target_modules=own)
            inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    for module in adapted_layers(model).values():
        dropout = module.lora_dropout[ADAPTER]
        if isinstance(dropout, nn.Dropout):
            module.lora_dropout[ADAPTER] = DropoutWithGradients(dropout.p)


def _key(lora: Lora) -> tuple[int, float, float, bool]:
    return lora.rank, lora.alpha, lora.dropout, lora.rank_stabilised


def adapted_layers(model: Any) -> dict[str, Any]:
    """peft's layers of a model by name; empty without adapters."""
    if not getattr(model, "peft_config", None):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapted_source(model: Any, source: TensorSource, seed: int) -> TensorSource:
    """The source of a model with adapters, from that of the plain one and the stage's seed."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if is_adapter(name)}

    def adapter(name: str) -> torch.Tensor:
        if UP in name:
            return torch.zeros(shapes[name])
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = 1.0 / math.sqrt(shapes[name][1])  # Kaiming's uniform distribution with a = sqrt(5), as peft draws it
        return torch.empty(shapes[name]).uniform_(-bound, bound, generator=generator)

    return SourceWithOwn(source, is_adapter, adapter, plain_name)


def merged(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole tensors of a model as those of the plain one. A layer's base, A and B come one after another, so one is held."""
    scales = {name: float(module.scaling[ADAPTER]) for name, module in adapted_layers(model).items()}
    held: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        layer, _, leaf = name.rpartition(BASE)
        if layer and leaf == "weight":
            held["base"] = tensor
        elif DOWN in name:
            held["down"] = tensor
        elif UP in name:
            layer = name.partition(UP)[0]
            base, down = held.pop("base"), held.pop("down")
            yield f"{layer}.weight", base + scales[layer] * (tensor.float() @ down.float())
        else:
            yield plain_name(name), tensor


def sources_of(names: Iterable[str]) -> dict[str, list[str]]:
    """By name in the plain model, the tensors of a model with adapters that `merged` makes it from, in the order in which it wants them."""
    found: dict[str, list[str]] = {}
    for name in names:
        layer = name.partition(DOWN if DOWN in name else UP)[0]
        found.setdefault(f"{layer}.weight" if is_adapter(name) else plain_name(name), []).append(name)
    return found


# ---------------------------------------------------------------- adapters in files


def split(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The plain model's tensors without what was trained beside them, and the adapters by their own names."""
    base = {plain_name(name): tensor for name, tensor in state.items() if not is_adapter(name)}
    return base, {name: tensor for name, tensor in state.items() if is_adapter(name)}


def write_adapter(model: Any, adapters: Mapping[str, torch.Tensor], base: str, out_dir: Path) -> None:
    """A directory that peft and vLLM load onto the model in `base`.

    Readers know one rank and one scale: adapters that differ in them are filled up with zeros to the largest rank, and their
    scale goes into B; the product stays what it is.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers = adapted_layers(model)
    kinds = {(module.r[ADAPTER], module.lora_alpha[ADAPTER], bool(module.use_rslora[ADAPTER])) for module in layers.values()}
    alike = len(kinds) == 1
    rank = max(kind[0] for kind in kinds)
    alpha, stabilised = next(iter(kinds))[1:] if alike else (rank, False)
    tensors = {}
    for name, module in layers.items():
        down, up = adapters[f"{name}{DOWN}weight"].float(), adapters[f"{name}{UP}weight"].float()
        if not alike:
            more = rank - down.shape[0]
            down, up = nn.functional.pad(down, (0, 0, 0, more)), nn.functional.pad(up * float(module.scaling[ADAPTER]), (0, more))
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    out_dir.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=rank, lora_alpha=int(alpha) if alpha == int(alpha) else alpha, use_rslora=stabilised, target_modules=sorted(layers),
        inference_mode=True, base_model_name_or_path=base,
    )
    config.save_pretrained(str(out_dir))
    written = out_dir / "adapter_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()), indent=2, sort_keys=True) + "\n")  # a set's order is chance
    save_file(tensors, out_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    (out_dir / "adapter_model.safetensors").chmod(0o644)
